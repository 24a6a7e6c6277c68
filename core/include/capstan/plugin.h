// defines: PluginInfo, Registrar, CAPSTAN_PLUGIN: what a shared library must export to be a plugin.
//
//   #include <capstan/plugin.h>
//   CAPSTAN_PLUGIN("optimizer", "adamw", "1.0.0") {
//     capstan::Schema schema;
//     schema.number("lr", 3e-4, "peak learning rate").above(0);
//     registrar.add("optimizer", "adamw", schema,
//                   [](const capstan::Options& o, capstan::Registrar&) {
//                     return capstan::as_interface<capstan::Optimizer>(std::make_shared<AdamW>(o));
//                   });
//   }
#pragma once
#include <capstan/error.h>
#include <capstan/export.h>
#include <capstan/options.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>

namespace capstan {

/// Raised by hand whenever a public type of core changes its layout or a virtual function changes
/// (tests/core/plugin pins the layouts); every plugin must then be rebuilt.
inline constexpr std::uint32_t core_epoch = 7;

/// One epoch for each kind of plugin, raised when that kind's interface changes.
constexpr std::uint32_t kind_epoch(std::string_view kind) {
  if (kind == "model") return 1;
  if (kind == "layer") return 1;
  if (kind == "optimizer") return 2;
  if (kind == "checkpoint") return 1;
  if (kind == "tokenizer") return 1;
  if (kind == "inference") return 1;
  return 0;  // no such kind
}

/// Compiler-visible facts that change the layout of types across the plugin boundary.
#define CAPSTAN_STRINGIFY_(x) #x
#define CAPSTAN_STRINGIFY(x) CAPSTAN_STRINGIFY_(x)
#if defined(_GLIBCXX_DEBUG)
#define CAPSTAN_CONTAINERS_ " debug-containers"  // other layouts of vector, map and string
#else
#define CAPSTAN_CONTAINERS_ ""
#endif
#if defined(_GLIBCXX_USE_CXX11_ABI)
#define CAPSTAN_TOOLCHAIN \
  "libstdc++ cxx11abi=" CAPSTAN_STRINGIFY(_GLIBCXX_USE_CXX11_ABI) " c++20 x" CAPSTAN_STRINGIFY(__SIZEOF_POINTER__) CAPSTAN_CONTAINERS_
#else
#define CAPSTAN_TOOLCHAIN "libc++ c++20 x" CAPSTAN_STRINGIFY(__SIZEOF_POINTER__)
#endif

/// Plain ints and chars in the ELF section `.capstan_plugin`, so that it is read from the file without
/// running the plugin's code. Never changes its layout.
struct PluginInfo {
  char magic[8];                 ///< "CAPSTAN\0"
  std::uint32_t size;            ///< sizeof(PluginInfo)
  std::uint32_t core_epoch;
  std::uint32_t kind_epoch;
  char kind[16];
  char name[48];
  char version[24];
  char toolchain[96];
};
static_assert(sizeof(PluginInfo) == 204);

/// What plugins register with and make other plugins through. Names are unique within a kind.
class CAPSTAN_API Registrar {
 public:
  using Factory = std::function<std::shared_ptr<void>(const Options&, Registrar&)>;
  virtual ~Registrar();
  /// Adds an implementation; a second one under the same (kind, name) is Error(input).
  virtual void add(std::string_view kind, std::string_view name, const Schema& schema, Factory factory) = 0;
  /// Makes what a recipe chose, loading its library on first use. Prefer make_as<T>().
  virtual std::shared_ptr<void> make(const PluginChoice& choice) = 0;

  /// The choice that a recipe would make by naming plugin (kind, name) with `overrides`: option names with their
  /// values as YAML text; every other option has its default. For plugins that make others of their own accord: a
  /// decoder without a pattern chooses its attention and MLP so. Error(input) on an unknown name, option or value.
  virtual PluginChoice choice(std::string_view kind, std::string_view name,
                              std::span<const std::pair<std::string, std::string>> overrides) = 0;

  /// T must be the interface class of the choice's kind (Model for "model", Optimizer for "optimizer").
  template <class T>
  std::shared_ptr<T> make_as(const PluginChoice& choice) { return std::static_pointer_cast<T>(make(choice)); }
};

/// A factory returns shared_ptr<void>; this makes it from the interface type, so that casts are exact.
template <class Interface, class Implementation>
std::shared_ptr<void> as_interface(std::shared_ptr<Implementation> p) {
  return std::static_pointer_cast<void>(std::static_pointer_cast<Interface>(std::move(p)));
}

/// Carries an error text over the C boundary.
struct PluginError { char text[1024]; };

}  // namespace capstan

/// Defines the two exported symbols; the block that follows registers, with `registrar` in scope.
#define CAPSTAN_PLUGIN(KIND, NAME, VERSION)                                                              \
  static void capstan_plugin_body(capstan::Registrar& registrar);                                        \
  extern "C" __attribute__((visibility("default"), used, section(".capstan_plugin")))                    \
  const capstan::PluginInfo capstan_plugin_info = {                                                      \
      {'C', 'A', 'P', 'S', 'T', 'A', 'N', 0}, sizeof(capstan::PluginInfo), capstan::core_epoch,          \
      capstan::kind_epoch(KIND), KIND, NAME, VERSION, CAPSTAN_TOOLCHAIN};                                \
  extern "C" __attribute__((visibility("default"), used)) bool capstan_plugin_register(                  \
      capstan::Registrar* registrar, capstan::PluginError* error) noexcept {                             \
    try {                                                                                                \
      capstan_plugin_body(*registrar);                                                                   \
      return true;                                                                                       \
    } catch (const std::exception& e) {                                                                  \
      std::size_t i = 0;                                                                                 \
      for (; e.what()[i] != 0 && i + 1 < sizeof(error->text); ++i) error->text[i] = e.what()[i];         \
      error->text[i] = 0;                                                                                \
      return false;                                                                                      \
    } catch (...) {                                                                                      \
      return false;                                                                                      \
    }                                                                                                    \
  }                                                                                                      \
  static_assert(capstan::kind_epoch(KIND) != 0, "unknown kind of plugin");                               \
  static void capstan_plugin_body([[maybe_unused]] capstan::Registrar& registrar)
