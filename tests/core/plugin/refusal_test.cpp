// Libraries that must not be loaded: stale, of the wrong kind, cut short, damaged, or failing to register. Each is refused
// with all five parts of the message, and the host works on.
#include "core/plugin/helpers.h"
#include "plugin/elf_section.h"
#include "plugin/host.h"

#include <capstan/tokenizer.h>

#include <elf.h>
#include <gmock/gmock.h>
#include <sys/stat.h>

#include <random>

namespace capstan::plugin_test {
namespace {

using testing::AllOf;
using testing::HasSubstr;

class Refusal : public testing::Test {
 protected:
  /// Writes a library, asks for it by path, and returns the message after checking its five parts.
  std::string refused(const std::string& bytes, const std::string& kind = "tokenizer") {
    const fs::path file = prefix_.folder.path / ("bad" + std::to_string(++count_) + ".so");
    write_bytes(file, bytes);
    PluginHost host(prefix_.program);
    const Caught caught = error_of([&] { host.schema(kind, file.string(), ""); });
    EXPECT_EQ(caught.fault, Fault::input);
    EXPECT_THAT(caught.text, HasSubstr("cannot load " + kind + " plugin"));
    EXPECT_THAT(caught.text, HasSubstr("from " + file.string() + ": "));
    EXPECT_THAT(caught.text, HasSubstr("\n  built for:    "));
    EXPECT_THAT(caught.text, HasSubstr("\n  this program: core epoch " + std::to_string(core_epoch)));
    EXPECT_THAT(caught.text, HasSubstr("\n  what to do:   "));
    EXPECT_THAT(caught.text, HasSubstr("\n  searched:     " + prefix_.plugins.string()));
    EXPECT_TRUE(host.loaded().empty());
    // The failure left nothing behind.
    if (!fs::exists(prefix_.plugins / "good.so")) prefix_.put("good");
    EXPECT_EQ(host.schema("tokenizer", "good", "").options().size(), 1u);
    return caught.text;
  }
  std::string refused_library(const std::string& name) { return refused(read_bytes(library(name))); }
  std::string refused_info(const std::function<void(PluginInfo&)>& change) { return refused(with_info("good", change)); }

  Prefix prefix_;
  int count_ = 0;
};

TEST_F(Refusal, OldCore) {
  EXPECT_THAT(refused_info([](PluginInfo& i) { i.core_epoch = core_epoch + 7; }),
              AllOf(HasSubstr("built for:    core epoch " + std::to_string(core_epoch + 7) + ", tokenizer epoch"),
                    HasSubstr("rebuild it against this program"), HasSubstr("lib/cmake/Capstan")));
}

TEST_F(Refusal, OldKind) {
  EXPECT_THAT(refused_info([](PluginInfo& i) { i.kind_epoch += 1; }),
              AllOf(HasSubstr("tokenizer epoch " + std::to_string(kind_epoch("tokenizer") + 1) + ", here " +
                              std::to_string(kind_epoch("tokenizer"))),
                    HasSubstr("rebuild")));
}

TEST_F(Refusal, OtherToolchain) {
  EXPECT_THAT(refused_info([](PluginInfo& i) { std::strcpy(i.toolchain, "libc++ c++20 x8"); }),
              AllOf(HasSubstr("toolchain 'libc++ c++20 x8'"), HasSubstr(CAPSTAN_TOOLCHAIN), HasSubstr("rebuild")));
}

TEST_F(Refusal, WrongKind) {
  EXPECT_THAT(refused(read_bytes(library("good")), "model"),
              AllOf(HasSubstr("it is a plugin of kind 'tokenizer'"), HasSubstr("a model is wanted here")));
}

TEST_F(Refusal, KindOfALaterProgram) {
  EXPECT_THAT(refused_info([](PluginInfo& i) { std::strcpy(i.kind, "rewards"); }), HasSubstr("no plugin kind 'rewards'"));
}

TEST_F(Refusal, DamagedDescription) {
  std::string bytes = read_bytes(library("good"));
  const std::size_t at = info_offset(bytes);
  bytes[at] = 'X';
  EXPECT_THAT(refused(bytes), HasSubstr("does not begin with CAPSTAN"));
  EXPECT_THAT(refused_info([](PluginInfo& i) { i.size = 0xffffffff; }), HasSubstr("4294967295 bytes"));
  EXPECT_THAT(refused_info([](PluginInfo& i) { std::memset(i.name, 'n', sizeof i.name); }), HasSubstr("unterminated"));
  EXPECT_THAT(refused_info([](PluginInfo& i) { i.version[0] = 0; }), HasSubstr("empty"));
  EXPECT_THAT(refused_info([](PluginInfo& i) { std::strcpy(i.name, "a\033[2Jb"); }), HasSubstr("not printable"));
  EXPECT_THAT(refused_info([](PluginInfo& i) { std::strcpy(i.name, "../x"); }), HasSubstr("slash"));
}

TEST_F(Refusal, MissingSymbol) {
  EXPECT_THAT(refused_library("no_register"), AllOf(HasSubstr("does not export the symbol capstan_plugin_register"),
                                                    HasSubstr("CAPSTAN_PLUGIN(kind, name, version)")));
}

TEST_F(Refusal, UndefinedSymbolOfCore) {
  EXPECT_THAT(
      refused_library("undefined_symbol"),
      AllOf(HasSubstr("undefined symbol"), HasSubstr("capstan::function_of_a_later_core(int)"), HasSubstr("rebuild")));
}

TEST_F(Refusal, RegistrationThrows) {
  EXPECT_THAT(refused_library("throws"), HasSubstr("registration failed: no licence found"));
  EXPECT_THAT(refused_library("throws_number"), HasSubstr("registration failed: no reason given"));
  EXPECT_THAT(refused_library("registers_nothing"), HasSubstr("it registers no tokenizer 'registers_nothing'"));
}

TEST_F(Refusal, HalfARegistrationIsTakenBack) {
  Prefix prefix;
  const std::string file = prefix.put("throws").string();
  PluginHost host(prefix.program);
  EXPECT_THROW(host.schema("tokenizer", "throws", ""), Error);
  EXPECT_THROW(host.schema("tokenizer", "left_behind", ""), Error);
  EXPECT_THAT(error_of([&] { host.schema("tokenizer", "throws", ""); }).text, HasSubstr("no licence found"));
}

TEST_F(Refusal, TakenName) {
  Prefix prefix;
  const fs::path good = prefix.put("good"), taken = prefix.put("registers_taken");
  PluginHost host(prefix.program);
  host.schema("tokenizer", "good", "");
  EXPECT_THAT(error_of([&] { host.schema("tokenizer", "registers_taken", ""); }).text,
              AllOf(HasSubstr("tokenizer 'good' is registered twice"), HasSubstr(good.string()), HasSubstr(taken.string())));
  EXPECT_EQ(host.loaded().size(), 1u);
  // The other way round the name is ambiguous too: one library brings it, another is called so.
  PluginHost reversed(prefix.program);
  reversed.schema("tokenizer", "registers_taken", "");
  EXPECT_THAT(error_of([&] { reversed.schema("tokenizer", "good", ""); }).text, HasSubstr("ambiguous"));
}

TEST_F(Refusal, NoLibraryAtAll) {
  EXPECT_THAT(refused("#!/bin/sh\necho a text file that is long enough to hold a whole ELF header, but is none\n"),
              HasSubstr("does not start as an ELF file does"));
  EXPECT_THAT(refused(""), HasSubstr("shorter than an ELF header"));
  EXPECT_THAT(refused_library("no_plugin"), HasSubstr("it has no section .capstan_plugin"));
  EXPECT_THAT(refused(read_bytes(fs::canonical("/proc/self/exe"))), HasSubstr(".so: "));
}

TEST_F(Refusal, OtherMachine) {
  std::string bytes = read_bytes(library("good"));
  bytes[offsetof(Elf64_Ehdr, e_machine)] = static_cast<char>(EM_RISCV);
  EXPECT_THAT(refused(bytes), HasSubstr("another machine"));
  bytes = read_bytes(library("good"));
  bytes[EI_CLASS] = ELFCLASS32;
  EXPECT_THAT(refused(bytes), HasSubstr("not a 64-bit library"));
}

TEST_F(Refusal, Truncated) {
  const std::string whole = read_bytes(library("good"));
  for (std::size_t parts = 1; parts < 16; ++parts) {
    const std::string text = refused(whole.substr(0, whole.size() * parts / 16));
    EXPECT_THAT(text, HasSubstr("truncated")) << parts;
  }
  EXPECT_THAT(refused(whole.substr(0, whole.size() - 1)), HasSubstr("truncated"));
}

TEST_F(Refusal, NotAFile) {
  const std::string fifo = (prefix_.folder.path / "pipe.so").string();
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  const std::string gone = (prefix_.folder.path / "gone.so").string(), folder = (prefix_.folder.path / "dir.so").string();
  fs::create_directory(folder);
  PluginHost host(prefix_.program);
  EXPECT_THAT(error_of([&] { host.schema("tokenizer", fifo, ""); }).text, HasSubstr("not a regular file"));
  EXPECT_THAT(error_of([&] { host.schema("tokenizer", folder, ""); }).text, HasSubstr("not a regular file"));
  EXPECT_THAT(error_of([&] { host.schema("tokenizer", gone, ""); }).text, HasSubstr("No such file"));
}

TEST_F(Refusal, ABrokenFileOfTheRightNameIsNamed) {
  const fs::path file = prefix_.plugins / "tokenizer_broken.so";
  write_bytes(file, "half a download");
  PluginHost host(prefix_.program);
  EXPECT_THAT(error_of([&] { host.schema("tokenizer", "broken", ""); }).text,
              AllOf(HasSubstr("cannot load tokenizer plugin 'broken'"), HasSubstr(file.string())));
}

TEST_F(Refusal, AStaleFileFoundByNameSaysWhy) {
  write_bytes(prefix_.plugins / "any.so", with_info("good", [](PluginInfo& i) { i.core_epoch += 1; }));
  PluginHost host(prefix_.program);
  EXPECT_THAT(error_of([&] { host.schema("tokenizer", "good", ""); }).text,
              AllOf(HasSubstr("cannot load tokenizer plugin 'good'"), HasSubstr("any.so"), HasSubstr("core epoch")));
}

// Whatever a file holds, reading it ends in bytes or in an Error.
TEST(ElfSection, DamagedHeadersNeverCrash) {
  TempFolder folder;
  const std::string whole = read_bytes(library("good"));
  Elf64_Ehdr header;
  std::memcpy(&header, whole.data(), sizeof header);
  std::vector<std::size_t> places;
  for (std::size_t i = 0; i < sizeof header; ++i) places.push_back(i);
  for (std::size_t i = 0; i < header.e_phnum * sizeof(Elf64_Phdr); ++i) places.push_back(header.e_phoff + i);
  for (std::size_t i = 0; i < header.e_shnum * sizeof(Elf64_Shdr); ++i) places.push_back(header.e_shoff + i);
  std::mt19937 random(7);
  int good = 0, bad = 0;
  const std::string path = (folder.path / "x.so").string();
  for (int round = 0; round < 600; ++round) {
    std::string bytes = whole;
    for (int k = 0; k <= round % 4; ++k) {
      bytes[places[random() % places.size()]] = static_cast<char>(round % 3 == 0 ? 0xff : random());
    }
    write_bytes(path, bytes);
    try {
      read_elf_section(path, ".capstan_plugin");
      ++good;
    } catch (const Error& e) {
      EXPECT_EQ(e.fault(), Fault::input);
      ++bad;
    }
  }
  EXPECT_GT(good, 40);
  EXPECT_GT(bad, 40);
}

TEST(ElfSection, HugeCountsCostNothing) {
  TempFolder folder;
  const std::string whole = read_bytes(library("good")), path = (folder.path / "x.so").string();
  const auto with_header = [&](auto change) {
    std::string bytes = whole;
    Elf64_Ehdr header;
    std::memcpy(&header, bytes.data(), sizeof header);
    change(header, bytes);
    std::memcpy(bytes.data(), &header, sizeof header);
    write_bytes(path, bytes);
    return error_of([&] { read_elf_section(path, ".capstan_plugin"); }).text;
  };
  EXPECT_THAT(with_header([](Elf64_Ehdr& h, std::string&) { h.e_shoff = ~0ull - 8; }), HasSubstr("truncated"));
  EXPECT_THAT(with_header([](Elf64_Ehdr& h, std::string&) { h.e_phoff = ~0ull - 8; }), HasSubstr("truncated"));
  EXPECT_THAT(with_header([](Elf64_Ehdr& h, std::string&) { h.e_shstrndx = 0xfff0; }), HasSubstr("corrupt"));
  EXPECT_THAT(with_header([](Elf64_Ehdr& h, std::string& bytes) {
                Elf64_Shdr first{};
                std::memcpy(&first, bytes.data() + h.e_shoff, sizeof first);
                first.sh_size = ~0ull;
                std::memcpy(bytes.data() + h.e_shoff, &first, sizeof first);
                h.e_shnum = 0;
              }),
              HasSubstr("sections"));
}

TEST(ElfSection, ReadsWhatTheLinkerWrote) {
  const auto bytes = read_elf_section(library("good").string(), ".capstan_plugin");
  ASSERT_TRUE(bytes.has_value());
  ASSERT_GE(bytes->size(), sizeof(PluginInfo));
  PluginInfo info;
  std::memcpy(&info, bytes->data(), sizeof info);
  EXPECT_STREQ(info.kind, "tokenizer");
  EXPECT_STREQ(info.version, "1.2.3");
  EXPECT_FALSE(read_elf_section(library("good").string(), ".capstan").has_value());
}

}  // namespace
}  // namespace capstan::plugin_test
