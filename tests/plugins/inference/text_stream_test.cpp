// Streaming text: over every way to cut the bytes, what is shown is the same, valid UTF-8, and free of stop texts.
#include "plugins/inference/basic/text_stream.h"

#include <gtest/gtest.h>

#include <functional>
#include <random>

namespace capstan::basic {
namespace {

bool valid_utf8(const std::string& s) { return repair_utf8(s) == s; }

/// Feeds `bytes` in pieces of the given sizes (the last size repeats); checks each shown piece.
std::string shown(const std::vector<std::string>& stop, const std::string& bytes, const std::vector<std::size_t>& cuts,
                  bool* stopped = nullptr) {
  TextStream stream(stop);
  std::string text;
  std::size_t at = 0, n = 0;
  while (at < bytes.size() && !stream.stopped()) {
    const std::size_t size = cuts[std::min(n++, cuts.size() - 1)];
    const std::string piece = stream.feed(std::string_view(bytes).substr(at, size));
    EXPECT_TRUE(valid_utf8(piece)) << "half a character was shown";
    text += piece;
    at += size;
  }
  if (stopped) *stopped = stream.stopped();
  return text + stream.finish();
}

/// All ways to cut a short text into pieces.
void for_every_cut(std::size_t length, const std::function<void(const std::vector<std::size_t>&)>& check) {
  for (std::size_t mask = 0; mask < (std::size_t{1} << (length - 1)); ++mask) {
    std::vector<std::size_t> cuts{1};
    for (std::size_t i = 1; i < length; ++i) {
      if (mask >> (i - 1) & 1)
        cuts.push_back(1);
      else
        ++cuts.back();
    }
    check(cuts);
  }
}

TEST(TextStream, StopTextsAreFoundAcrossPiecesAndNeverShown) {
  const std::string bytes = "abab\nEnd\nx";
  for_every_cut(bytes.size(), [&](const auto& cuts) {
    bool stopped = false;
    EXPECT_EQ(shown({"\nEnd", "zzz"}, bytes, cuts, &stopped), "abab");
    EXPECT_TRUE(stopped);
  });
}

TEST(TextStream, BeginningsOfStopTextsAreShownOnceTheyFail) {
  const std::string bytes = "aabaabaac";
  for_every_cut(bytes.size(), [&](const auto& cuts) {
    bool stopped = true;
    EXPECT_EQ(shown({"aabaaa", "acd"}, bytes, cuts, &stopped), bytes);
    EXPECT_FALSE(stopped);
  });
}

TEST(TextStream, TheStopTextThatIsCompleteFirstCutsHoweverBytesCome) {
  for_every_cut(5, [&](const auto& cuts) {
    EXPECT_EQ(shown({"cd", "bcde"}, "abcde", cuts), "ab");
    EXPECT_EQ(shown({"bcde", "cd"}, "abcde", cuts), "ab");
    EXPECT_EQ(shown({"cd", "bcd"}, "abcde", cuts), "a");
  });
}

TEST(TextStream, CharactersAreShownWhole) {
  const std::string bytes = "a\u00e9\u20ac\U0001F600b";
  for_every_cut(bytes.size(), [&](const auto& cuts) { EXPECT_EQ(shown({}, bytes, cuts), bytes); });
  TextStream stream({});
  EXPECT_EQ(stream.feed("\xE2\x82"), "");
  EXPECT_EQ(stream.feed("\xAC"), "\u20ac");
}

TEST(TextStream, BrokenBytesBecomeReplacementCharactersHoweverCut) {
  // Lone continuation, overlong form, surrogate, a cut four-byte form, a byte that never occurs; two cut at the end.
  const std::string bytes = "\x80x\xC0\xAF\xED\xA0\x80\xF0\x9F\x98\xFF\xE2\x82";
  const std::string once = repair_utf8(bytes);
  EXPECT_EQ(once, "\uFFFDx\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD");
  for_every_cut(bytes.size(), [&](const auto& cuts) { EXPECT_EQ(shown({}, bytes, cuts), once); });
}

TEST(TextStream, RandomBytesAndCutsAgreeWithOnePiece) {
  std::mt19937 random(1);
  const std::string alphabet = "ab\xE2\x82\xAC\xF0\x9F";
  for (int trial = 0; trial < 2000; ++trial) {
    std::string bytes;
    std::vector<std::size_t> cuts;
    for (int i = 0; i < 24; ++i) bytes += alphabet[random() % alphabet.size()];
    for (int i = 0; i < 24; ++i) cuts.push_back(1 + random() % 4);
    const std::vector<std::string> stop{"abba", "b\xE2", "bb", "aaa"};
    // The shortest beginning of the bytes that ends in a stop text, without the longest such.
    std::size_t end = 0, length = 0;
    for (; end <= bytes.size() && length == 0; ++end) {
      for (const auto& s : stop) {
        if (std::string_view(bytes).substr(0, end).ends_with(s)) length = std::max(length, s.size());
      }
    }
    const std::size_t first = length ? end - 1 - length : bytes.size();
    EXPECT_EQ(shown(stop, bytes, cuts), repair_utf8(bytes.substr(0, first)));
  }
}

}  // namespace
}  // namespace capstan::basic
