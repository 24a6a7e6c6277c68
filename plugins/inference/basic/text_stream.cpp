// TextStream and UTF-8: see text_stream.h.
#include "text_stream.h"

#include <algorithm>
#include <cstddef>

namespace capstan::basic {
namespace {

/// What stands at the start of `s`: how many bytes belong together, whether they are a character, and whether they could
/// become one if bytes followed.
struct Piece {
  std::size_t bytes;
  bool whole, open;
};

Piece piece_at(std::string_view s) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(s[i]); };
  const unsigned lead = byte(0);
  if (lead < 0x80) return {1, true, false};
  // Table 3-7 of the Unicode standard: the second byte's range depends on the first (no overlong forms, no surrogates).
  std::size_t length = 0;
  unsigned low = 0x80, high = 0xBF;
  if (lead >= 0xC2 && lead <= 0xDF)
    length = 2;
  else if (lead >= 0xE0 && lead <= 0xEF)
    length = 3, low = lead == 0xE0 ? 0xA0 : 0x80, high = lead == 0xED ? 0x9F : 0xBF;
  else if (lead >= 0xF0 && lead <= 0xF4)
    length = 4, low = lead == 0xF0 ? 0x90 : 0x80, high = lead == 0xF4 ? 0x8F : 0xBF;
  else
    return {1, false, false};
  for (std::size_t i = 1; i < length; ++i) {
    if (i == s.size()) return {i, false, true};
    if (byte(i) < low || byte(i) > high) return {i, false, false};
    low = 0x80, high = 0xBF;
  }
  return {length, true, false};
}

}  // namespace

std::string repair_utf8(std::string_view bytes) {
  std::string out;
  while (!bytes.empty()) {
    const Piece piece = piece_at(bytes);
    if (piece.whole)
      out.append(bytes.substr(0, piece.bytes));
    else
      out.append("\xEF\xBF\xBD");
    bytes.remove_prefix(piece.bytes);
  }
  return out;
}

std::size_t open_character(std::string_view bytes) {
  for (std::size_t n = 1; n <= 3 && n <= bytes.size(); ++n) {
    const Piece piece = piece_at(bytes.substr(bytes.size() - n));
    if (piece.open && piece.bytes == n) return n;
  }
  return 0;
}

std::string TextStream::feed(std::string_view bytes) {
  if (stopped_) return {};
  pending_.append(bytes);
  // The first to be complete decides, so that it does not matter how tokens cut the bytes.
  std::size_t first = std::string::npos, first_end = std::string::npos;
  for (const std::string& stop : stop_) {
    const std::size_t at = pending_.find(stop);
    if (at == std::string::npos) continue;
    const std::size_t end = at + stop.size();
    if (end < first_end || (end == first_end && at < first)) first = at, first_end = end;
  }
  if (first != std::string::npos) {
    stopped_ = true;
    std::string text = repair_utf8(std::string_view(pending_).substr(0, first));
    pending_.clear();
    return text;
  }
  // What may yet turn out to be the start of a stop text waits, and so does an open character before it.
  std::size_t wait = 0;
  for (const std::string& stop : stop_) {
    for (std::size_t n = std::min(stop.size() - 1, pending_.size()); n > wait; --n) {
      if (pending_.compare(pending_.size() - n, n, stop, 0, n) == 0) wait = n;
    }
  }
  std::size_t ready = pending_.size() - wait;
  ready -= open_character(std::string_view(pending_).substr(0, ready));
  std::string text = repair_utf8(std::string_view(pending_).substr(0, ready));
  pending_.erase(0, ready);
  return text;
}

std::string TextStream::finish() {
  std::string text = repair_utf8(pending_);
  pending_.clear();
  return text;
}

}  // namespace capstan::basic
