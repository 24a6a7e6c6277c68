// defines: TextStream: bytes of tokens in, final text out.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace capstan::basic {

/// Turns a request's bytes into text that can be shown at once: valid UTF-8, no character by halves, no part of a stop
/// text. Stop texts are sought in the bytes, so one may begin in one token and end in another; the first to be complete
/// ends the text, of several complete at once the longest. Bytes that are not UTF-8 become U+FFFD, one for each longest
/// broken piece (Unicode 15, section 3.9).
class TextStream {
 public:
  explicit TextStream(std::vector<std::string> stop) : stop_(std::move(stop)) {}
  /// Takes the next bytes; returns what became final. After a stop text was found, stopped() is true, and no more text
  /// comes.
  std::string feed(std::string_view bytes);
  /// The rest, when nothing follows.
  std::string finish();
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stop_;
  std::string pending_;
  bool stopped_ = false;
};

/// `bytes` with broken pieces replaced by U+FFFD.
std::string repair_utf8(std::string_view bytes);

/// How many bytes at the end of `bytes` begin a UTF-8 character that further bytes may complete: 0 to 3.
std::size_t open_character(std::string_view bytes);

}  // namespace capstan::basic
