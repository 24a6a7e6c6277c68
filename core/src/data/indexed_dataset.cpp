// The reader of .bin/.idx datasets: maps both files, checks the whole index once, then reads without checks.
#include "data/indexed_dataset.h"

#include <capstan/error.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstring>
#include <utility>

#include "data/index_layout.h"

namespace capstan::data {

static_assert(std::endian::native == std::endian::little, "the file format is little-endian and is mapped as it is");

std::int64_t size_of(TokenType type) {
  switch (type) {
    case TokenType::u8:
    case TokenType::i8:
      return 1;
    case TokenType::i16:
    case TokenType::u16:
      return 2;
    case TokenType::i32:
      return 4;
    case TokenType::i64:
      return 8;
  }
  fail(Fault::programming, "size_of", "unknown token type");
}

std::string_view name_of(TokenType type) {
  switch (type) {
    case TokenType::u8:
      return "u8";
    case TokenType::i8:
      return "i8";
    case TokenType::i16:
      return "i16";
    case TokenType::u16:
      return "u16";
    case TokenType::i32:
      return "i32";
    case TokenType::i64:
      return "i64";
  }
  fail(Fault::programming, "name_of", "unknown token type");
}

TokenType token_type_for(std::int64_t vocabulary) { return vocabulary < 65500 ? TokenType::u16 : TokenType::i32; }

MappedFile::MappedFile(std::string path) : path_(std::move(path)) {
  const int file = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) {
    const int code = errno;
    fail(Fault::input, path_,
         fmt::format("cannot open the file: {}; {}", std::strerror(code),
                     code == ENOENT ? "a dataset is named without .bin or .idx; `capstan data build` makes one"
                                    : "check the path and its permissions"));
  }
  struct stat status {};
  if (::fstat(file, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(file);
    fail(Fault::input, path_, "not a regular file");
  }
  bytes_ = status.st_size;
  void* data = nullptr;
  int code = 0;
  if (bytes_ > 0) {
    data = ::mmap(nullptr, static_cast<std::size_t>(bytes_), PROT_READ, MAP_SHARED, file, 0);
    if (data == MAP_FAILED) code = errno;
  }
  ::close(file);
  if (code != 0) fail(Fault::runtime, path_, fmt::format("cannot map {} bytes: {}", bytes_, std::strerror(code)));
  data_ = static_cast<const unsigned char*>(data);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<unsigned char*>(data_), static_cast<std::size_t>(bytes_));
}

IndexedDataset::IndexedDataset(const std::string& prefix)
    : prefix_(prefix), index_(prefix + ".idx"), tokens_file_(prefix + ".bin") {
  check_index();
}

std::int64_t IndexedDataset::load_i64(std::int64_t offset) const {
  std::int64_t value;
  std::memcpy(&value, index_.data() + offset, sizeof value);
  return value;
}

std::int32_t IndexedDataset::sequence_length(std::int64_t sequence) const {
  std::int32_t value;
  std::memcpy(&value, index_.data() + layout::lengths_at + 4 * sequence, sizeof value);
  return value;
}

std::int64_t IndexedDataset::document_begin(std::int64_t document) const {
  const std::int64_t sequence = load_i64(layout::documents_at(sequences_) + 8 * document);
  // Past the last sequence there is no offset to read: the stream ends there.
  if (sequence == sequences_) return tokens_;
  return load_i64(layout::offsets_at(sequences_) + 8 * sequence) / size_of(type_);
}

void IndexedDataset::check_index() {
  const auto damaged = [&](std::int64_t offset, const std::string& what, const std::string& expected,
                           const std::string& got) {
    fail(Fault::input, fmt::format("{}, byte {}", index_.path(), offset),
         fmt::format("{}: expected {}, got {}; the file is damaged or not a dataset index: build or copy it again", what,
                     expected, got));
  };
  const std::int64_t bytes = index_.bytes();
  if (bytes < layout::lengths_at) {
    damaged(bytes, "file too short", fmt::format("a header of {} bytes", layout::lengths_at),
            fmt::format("{} bytes", bytes));
  }
  if (std::memcmp(index_.data(), layout::magic, sizeof layout::magic) != 0) {
    std::string got;
    for (std::size_t i = 0; i < sizeof layout::magic; ++i) got += fmt::format("{:02x}", index_.data()[i]);
    damaged(0, "magic number", "4d4d49444944580000 (MMIDIDX)", got);
  }
  const auto version = static_cast<std::uint64_t>(load_i64(layout::version_at));
  if (version != 1) damaged(layout::version_at, "version", "1", fmt::format("{}", version));
  const unsigned code = index_.data()[layout::type_at];
  if (code == 6 || code == 7) {
    damaged(layout::type_at, "token type", "integers (1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16)",
            fmt::format("code {}, floating-point numbers", code));
  }
  if (code < 1 || code > 8) {
    damaged(layout::type_at, "token type", "1 u8, 2 i8, 3 i16, 4 i32, 5 i64 or 8 u16", fmt::format("code {}", code));
  }
  type_ = static_cast<TokenType>(code);

  const auto sequences = static_cast<std::uint64_t>(load_i64(layout::sequences_at));
  const auto entries = static_cast<std::uint64_t>(load_i64(layout::entries_at));
  // Bounded before they are multiplied, so that no product overflows.
  const auto limit = static_cast<std::uint64_t>(bytes);
  if (sequences > limit / 12) {
    damaged(layout::sequences_at, "number of sequences", fmt::format("at most {} in a file of {} bytes", limit / 12, bytes),
            fmt::format("{}", sequences));
  }
  if (entries == 0 || entries > limit / 8) {
    damaged(layout::entries_at, "number of document boundaries",
            fmt::format("1 to {} in a file of {} bytes", limit / 8, bytes), fmt::format("{}", entries));
  }
  sequences_ = static_cast<std::int64_t>(sequences);
  documents_ = static_cast<std::int64_t>(entries) - 1;
  const std::int64_t expected = layout::index_bytes(sequences_, documents_);
  if (bytes != expected) {
    const bool modes = bytes == expected + sequences_ && sequences_ > 0;
    fail(Fault::input, fmt::format("{}, byte {}", index_.path(), bytes < expected ? bytes : expected),
         fmt::format("file size: expected {} bytes for {} sequences and {} documents, got {}; {}", expected, sequences_,
                     documents_, bytes,
                     modes ? "it may be a multimodal dataset (one mode byte a sequence), which is not supported"
                           : "the file is damaged: build or copy it again"));
  }

  const std::int64_t size = size_of(type_), bin = tokens_file_.bytes();
  std::int64_t end = 0;
  for (std::int64_t i = 0; i < sequences_; ++i) {
    const std::int64_t length = sequence_length(i);
    if (length < 0) {
      damaged(layout::lengths_at + 4 * i, fmt::format("length of sequence {}", i), "0 or more", fmt::format("{}", length));
    }
    const std::int64_t at = layout::offsets_at(sequences_) + 8 * i, offset = load_i64(at);
    if (offset != end) {
      damaged(at, fmt::format("offset of sequence {}", i), fmt::format("{}, the end of the sequence before it", end),
              fmt::format("{}", offset));
    }
    if (length > (bin - end) / size) {
      damaged(layout::lengths_at + 4 * i, fmt::format("length of sequence {}", i),
              fmt::format("at most {} tokens, which {} bytes of {} leave", (bin - end) / size, bin, tokens_file_.path()),
              fmt::format("{}", length));
    }
    end += length * size;
  }
  if (end != bin) {
    fail(Fault::input, fmt::format("{}, byte {}", tokens_file_.path(), end),
         fmt::format("file size: expected {} bytes, as {} says, got {}; the two files do not belong together or one is "
                     "damaged: build or copy both again",
                     end, index_.path(), bin));
  }
  tokens_ = end / size;

  std::int64_t last = 0;
  for (std::int64_t i = 0; i <= documents_; ++i) {
    const std::int64_t at = layout::documents_at(sequences_) + 8 * i, first = load_i64(at);
    if (i == 0 && first != 0) damaged(at, "first document boundary", "0", fmt::format("{}", first));
    if (first < last || first > sequences_) {
      damaged(at, fmt::format("document boundary {}", i), fmt::format("{} to {}", last, sequences_),
              fmt::format("{}", first));
    }
    last = first;
  }
  if (last != sequences_) {
    damaged(layout::documents_at(sequences_) + 8 * documents_, "last document boundary",
            fmt::format("{}, the number of sequences", sequences_), fmt::format("{}", last));
  }
}

namespace {

/// Copies `out.size()` tokens of type T; true when every one is in [0, limit).
template <class T>
bool copy_tokens(const unsigned char* from, std::span<std::int32_t> out, std::int64_t limit) {
  bool good = true;
  for (std::size_t i = 0; i < out.size(); ++i) {
    T value;
    std::memcpy(&value, from + i * sizeof(T), sizeof(T));
    const auto wide = static_cast<std::int64_t>(value);
    good &= wide >= 0 && wide < limit;
    out[i] = static_cast<std::int32_t>(value);
  }
  return good;
}

std::int64_t token_at(const unsigned char* from, TokenType type) {
  const auto load = [&](auto value) {
    std::memcpy(&value, from, sizeof value);
    return static_cast<std::int64_t>(value);
  };
  switch (type) {
    case TokenType::u8:
      return load(std::uint8_t{});
    case TokenType::i8:
      return load(std::int8_t{});
    case TokenType::i16:
      return load(std::int16_t{});
    case TokenType::u16:
      return load(std::uint16_t{});
    case TokenType::i32:
      return load(std::int32_t{});
    case TokenType::i64:
      return load(std::int64_t{});
  }
  return -1;
}

}  // namespace

void IndexedDataset::read(std::int64_t begin, std::span<std::int32_t> out, std::int64_t vocabulary) const {
  const auto count = static_cast<std::int64_t>(out.size());
  if (begin < 0 || begin > tokens_ || count > tokens_ - begin) {
    fail(Fault::programming, prefix_, fmt::format("read of tokens {} to {} of {}", begin, begin + count, tokens_));
  }
  if (count == 0) return;
  const std::int64_t size = size_of(type_), limit = vocabulary > 0 ? vocabulary : std::int64_t{INT32_MAX} + 1;
  const unsigned char* from = tokens_file_.data() + begin * size;
  bool good = false;
  switch (type_) {
    case TokenType::u8:
      good = copy_tokens<std::uint8_t>(from, out, limit);
      break;
    case TokenType::i8:
      good = copy_tokens<std::int8_t>(from, out, limit);
      break;
    case TokenType::i16:
      good = copy_tokens<std::int16_t>(from, out, limit);
      break;
    case TokenType::u16:
      good = copy_tokens<std::uint16_t>(from, out, limit);
      break;
    case TokenType::i32:
      good = copy_tokens<std::int32_t>(from, out, limit);
      break;
    case TokenType::i64:
      good = copy_tokens<std::int64_t>(from, out, limit);
      break;
  }
  if (good) return;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t token = token_at(from + i * size, type_);
    if (token >= 0 && token < limit) continue;
    fail(Fault::input, fmt::format("{}, byte {}", tokens_file_.path(), (begin + i) * size),
         fmt::format("token {}: expected an id of 0 to {}, got {}; was the dataset built with another tokenizer?", begin + i,
                     limit - 1, token));
  }
}

}  // namespace capstan::data
