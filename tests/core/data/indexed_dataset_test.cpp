// The .bin/.idx format: its bytes, every token type, and what happens to damaged files.
#include "data/indexed_dataset.h"

#include <gmock/gmock.h>
#include <sys/resource.h>

#include <cstring>
#include <random>

#include "data/output_file.h"
#include "helpers.h"

namespace capstan::data {
namespace {

using ::testing::HasSubstr;

std::string hex(const std::string& bytes) {
  std::string out;
  for (const char c : bytes) {
    constexpr const char* digits = "0123456789abcdef";
    out += digits[static_cast<unsigned char>(c) >> 4];
    out += digits[static_cast<unsigned char>(c) & 15];
  }
  return out;
}

template <class T>
std::string patched(std::string bytes, std::size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof value);
  return bytes;
}

// Two documents as Megatron-LM's builder writes them.
TEST(IndexedDataset, WritesMegatronsBytes) {
  const TempFolder folder;
  write_dataset(folder / "golden", {{10, 11, 12}, {13, 14}});
  EXPECT_EQ(hex(read_file(folder / "golden.idx")),
            "4d4d494449445800000100000000000000040200000000000000030000000000"
            "0000030000000200000000000000000000000c00000000000000000000000000"
            "000001000000000000000200000000000000");
  EXPECT_EQ(hex(read_file(folder / "golden.bin")), "0a0000000b0000000c0000000d0000000e000000");
}

TEST(IndexedDataset, ChoosesTheTypeByVocabulary) {
  EXPECT_EQ(token_type_for(257), TokenType::u16);
  EXPECT_EQ(token_type_for(65499), TokenType::u16);
  EXPECT_EQ(token_type_for(65500), TokenType::i32);
}

TEST(IndexedDataset, EveryTypeComesBack) {
  const TempFolder folder;
  const std::map<TokenType, std::int32_t> largest = {{TokenType::u8, 255},        {TokenType::i8, 127},
                                                     {TokenType::i16, 32767},     {TokenType::u16, 65535},
                                                     {TokenType::i32, INT32_MAX}, {TokenType::i64, INT32_MAX}};
  for (const auto& [type, top] : largest) {
    const std::string prefix = folder / std::string(name_of(type));
    const Documents documents = {{0, 1, top}, {}, {top}, {7, top - 1}};
    write_dataset(prefix, documents, type);
    const IndexedDataset dataset(prefix);
    EXPECT_EQ(dataset.type(), type);
    EXPECT_EQ(dataset.tokens(), 6);
    EXPECT_EQ(dataset.sequences(), 4);
    EXPECT_EQ(read_dataset(dataset), documents);
    EXPECT_EQ(read_file(prefix + ".bin").size(), static_cast<std::size_t>(6 * size_of(type)));
    if (top == INT32_MAX) continue;
    EXPECT_THAT(error_of(Fault::input, [&] { write_dataset(folder / "over", {{top + 1}}, type); }),
                HasSubstr("does not fit"));
  }
  EXPECT_FALSE(std::filesystem::exists(folder / "over.idx"));
}

TEST(IndexedDataset, EmptyDatasetAndEmptyDocuments) {
  const TempFolder folder;
  write_dataset(folder / "none", {});
  EXPECT_EQ(IndexedDataset(folder / "none").documents(), 0);
  write_dataset(folder / "hollow", {{}, {}});
  const IndexedDataset hollow(folder / "hollow");
  EXPECT_EQ(hollow.documents(), 2);
  EXPECT_EQ(hollow.tokens(), 0);
}

// A document of several sequences, as sentence-split datasets and documents beyond 2^31 tokens have them.
TEST(IndexedDataset, DocumentsOfSeveralSequences) {
  const TempFolder folder;
  IndexedDatasetWriter writer(folder / "long", TokenType::u16, 4);
  const Documents documents = {{1, 2, 3, 4, 5, 6, 7, 8, 9}, {1, 2, 3, 4}, {5}};
  writer.append(std::span(documents[0]).first(3));
  writer.append(std::span(documents[0]).subspan(3));
  writer.end_document();
  for (const std::size_t d : {1u, 2u}) writer.append(documents[d]), writer.end_document();
  writer.finish();
  const IndexedDataset dataset(folder / "long");
  EXPECT_EQ(dataset.sequences(), 5);
  EXPECT_EQ(dataset.sequence_length(2), 1);
  EXPECT_EQ(read_dataset(dataset), documents);
}

TEST(IndexedDataset, IdsOutsideTheVocabularyAreFound) {
  const TempFolder folder;
  write_dataset(folder / "a", {{1, 2}, {300, 4}});
  const IndexedDataset dataset(folder / "a");
  std::vector<std::int32_t> tokens(4);
  EXPECT_THAT(error_of(Fault::input, [&] { dataset.read(0, tokens, 300); }),
              AllOf(HasSubstr("a.bin, byte 8"), HasSubstr("token 2"), HasSubstr("got 300")));
  dataset.read(0, tokens, 301);
  write_dataset(folder / "b", {{1, -2}});
  tokens.resize(2);
  EXPECT_THAT(error_of(Fault::input, [&] { IndexedDataset(folder / "b").read(0, tokens); }), HasSubstr("got -2"));
  error_of(Fault::programming, [&] { dataset.read(3, tokens); });
}

class Damaged : public ::testing::Test {
 protected:
  void SetUp() override {
    write_dataset(folder_ / "set", {{10, 11, 12}, {13, 14}, {15}});
    index_ = read_file(folder_ / "set.idx"), bin_ = read_file(folder_ / "set.bin");
  }
  std::string message(const std::string& index, const std::string& bin) {
    write_file(folder_ / "set.idx", index), write_file(folder_ / "set.bin", bin);
    return error_of(Fault::input, [&] { IndexedDataset(folder_ / "set"); });
  }
  TempFolder folder_;
  std::string index_, bin_;
};

// N = 3 and D = 4: lengths at 34, offsets at 46, boundaries at 70, 102 bytes in all.
TEST_F(Damaged, EveryFieldIsNamed) {
  ASSERT_EQ(index_.size(), 102u);
  const auto with = [&](std::size_t at, auto value) { return message(patched(index_, at, value), bin_); };
  EXPECT_THAT(with(0, 'X'), AllOf(HasSubstr("set.idx, byte 0"), HasSubstr("magic"), HasSubstr("got 584d49")));
  EXPECT_THAT(with(9, std::uint64_t{2}), AllOf(HasSubstr("byte 9"), HasSubstr("version: expected 1, got 2")));
  EXPECT_THAT(with(17, std::uint8_t{9}), AllOf(HasSubstr("byte 17"), HasSubstr("code 9")));
  EXPECT_THAT(with(17, std::uint8_t{0}), HasSubstr("code 0"));
  EXPECT_THAT(with(17, std::uint8_t{7}), HasSubstr("floating-point"));
  EXPECT_THAT(with(17, std::uint8_t{8}), AllOf(HasSubstr("byte 54"), HasSubstr("expected 6"), HasSubstr("got 12")));
  EXPECT_THAT(with(18, ~std::uint64_t{0}), AllOf(HasSubstr("byte 18"), HasSubstr("number of sequences")));
  EXPECT_THAT(with(18, std::uint64_t{4}), AllOf(HasSubstr("file size"), HasSubstr("got 102")));
  EXPECT_THAT(with(26, std::uint64_t{0}), AllOf(HasSubstr("byte 26"), HasSubstr("document boundaries")));
  EXPECT_THAT(with(26, ~std::uint64_t{0}), HasSubstr("byte 26"));
  EXPECT_THAT(with(26, std::uint64_t{5}), HasSubstr("expected 110 bytes"));
  EXPECT_THAT(with(34, std::int32_t{-1}),
              AllOf(HasSubstr("byte 34"), HasSubstr("length of sequence 0"), HasSubstr("got -1")));
  EXPECT_THAT(with(42, std::int32_t{2}), AllOf(HasSubstr("byte 42"), HasSubstr("at most 1 tokens"), HasSubstr("got 2")));
  EXPECT_THAT(with(34, INT32_MAX), HasSubstr("byte 34"));
  EXPECT_THAT(with(54, std::int64_t{8}),
              AllOf(HasSubstr("byte 54"), HasSubstr("offset of sequence 1"), HasSubstr("expected 12")));
  EXPECT_THAT(with(54, std::int64_t{-8}), HasSubstr("got -8"));
  EXPECT_THAT(with(70, std::int64_t{1}), AllOf(HasSubstr("byte 70"), HasSubstr("first document boundary")));
  EXPECT_THAT(with(78, std::int64_t{4}), AllOf(HasSubstr("byte 78"), HasSubstr("document boundary 1"), HasSubstr("got 4")));
  EXPECT_THAT(with(86, std::int64_t{0}), AllOf(HasSubstr("byte 86"), HasSubstr("expected 1 to 3"), HasSubstr("got 0")));
  EXPECT_THAT(with(94, std::int64_t{2}), AllOf(HasSubstr("byte 94"), HasSubstr("last document boundary")));
}

TEST_F(Damaged, SizesAreChecked) {
  for (std::size_t size = 0; size < index_.size(); ++size) message(index_.substr(0, size), bin_);
  for (std::size_t size = 0; size < bin_.size(); ++size) message(index_, bin_.substr(0, size));
  EXPECT_THAT(message(index_ + "x", bin_), HasSubstr("expected 102 bytes"));
  EXPECT_THAT(message(index_ + "xyz", bin_), HasSubstr("multimodal"));
  EXPECT_THAT(message(index_, bin_ + "x"), AllOf(HasSubstr("set.bin, byte 24"), HasSubstr("got 25")));
}

// Whatever bytes an index has: it opens and every token can be read, or it is refused; no crash (run under sanitizers).
TEST_F(Damaged, RandomDamageNeverCrashes) {
  std::mt19937 random(1);
  int refused = 0;
  for (int round = 0; round < 1000; ++round) {
    std::string index = index_;
    const unsigned changes = 1 + random() % 3;
    for (unsigned i = 0; i < changes; ++i) {
      index[random() % index.size()] = static_cast<char>(random() % 2 ? random() % 256 : random() % 4);
    }
    if (random() % 8 == 0) index.resize(random() % (index.size() + 16));
    write_file(folder_ / "set.idx", index);
    try {
      const IndexedDataset dataset(folder_ / "set");
      try {
        read_dataset(dataset);
      } catch (const Error& e) {
        EXPECT_EQ(e.fault(), Fault::input);
      }
    } catch (const Error& e) {
      EXPECT_EQ(e.fault(), Fault::input);
      ++refused;
    }
  }
  EXPECT_GT(refused, 600);
}

TEST_F(Damaged, MissingFiles) {
  EXPECT_THAT(error_of(Fault::input, [&] { IndexedDataset(folder_ / "nothing"); }),
              AllOf(HasSubstr("nothing.idx"), HasSubstr("No such file"), HasSubstr("capstan data build")));
  std::filesystem::remove(folder_ / "set.bin");
  EXPECT_THAT(error_of(Fault::input, [&] { IndexedDataset(folder_ / "set"); }), HasSubstr("set.bin"));
  std::filesystem::create_directory(folder_ / "set.bin");
  EXPECT_THAT(error_of(Fault::input, [&] { IndexedDataset(folder_ / "set"); }), HasSubstr("not a regular file"));
}

TEST_F(Damaged, SidecarsMustBelong) {
  EXPECT_FALSE(Sidecar::read(IndexedDataset(folder_ / "set")).has_value());
  Sidecar sidecar;
  sidecar.tokenizer = "byte", sidecar.vocabulary = 257, sidecar.end_of_document = 256;
  sidecar.documents = 3, sidecar.tokens = 6, sidecar.inputs = 2, sidecar.input_bytes = 99;
  sidecar.input_digest = "0123456789abcdef", sidecar.bin_digest = bin_digest(folder_ / "set");
  write_file(folder_ / "set.json", sidecar.to_json());
  const auto read = Sidecar::read(IndexedDataset(folder_ / "set"));
  ASSERT_TRUE(read.has_value());
  EXPECT_EQ(read->to_json(), sidecar.to_json());
  const auto refused = [&](const std::string& text) {
    write_file(folder_ / "set.json", text);
    return error_of(Fault::input, [&] { Sidecar::read(IndexedDataset(folder_ / "set")); });
  };
  sidecar.tokens = 7;
  EXPECT_THAT(refused(sidecar.to_json()), HasSubstr("belongs to another dataset"));
  EXPECT_THAT(refused("{"), HasSubstr("damaged"));
  EXPECT_THAT(refused("[]"), HasSubstr("damaged"));
  EXPECT_THAT(refused(R"({"format": "capstan dataset", "version": 2})"), HasSubstr("version: expected 1, got 2"));
  EXPECT_THAT(refused(R"({"format": "something"})"), HasSubstr("not a note"));
}

TEST(Writer, NothingShowsBeforeFinish) {
  const TempFolder folder;
  {
    IndexedDatasetWriter writer(folder / "set", TokenType::u16);
    writer.append(std::vector<std::int32_t>(2000000, 5));
    writer.end_document();
    EXPECT_TRUE(std::filesystem::exists(folder / "set.bin.partial"));
    EXPECT_FALSE(std::filesystem::exists(folder / "set.bin"));
    EXPECT_THAT(error_of(Fault::input, [&] { IndexedDatasetWriter(folder / "set", TokenType::u16); }),
                HasSubstr("another process"));
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  IndexedDatasetWriter writer(folder / "set", TokenType::u16);
  writer.append(std::vector<std::int32_t>{1});
  error_of(Fault::programming, [&] { writer.finish(); });
}

TEST(Writer, AFullDiskSaysSo) {
  const TempFolder folder;
  std::filesystem::create_symlink("/dev/full", folder / "x.partial");
  OutputFile file(folder / "x");
  EXPECT_THAT(error_of(Fault::runtime,
                       [&] {
                         file.write(std::string(3000000, 'a').data(), 3000000);
                         file.sync();
                       }),
              AllOf(HasSubstr("x.partial"), HasSubstr("disk is full")));
}

TEST(Writer, AFolderThatIsMissingSaysSo) {
  const TempFolder folder;
  EXPECT_THAT(error_of(Fault::input, [&] { OutputFile(folder / "no/x"); }), AllOf(HasSubstr("no/x"), HasSubstr("No such")));
}

}  // namespace
}  // namespace capstan::data
