// Describes itself as a plugin but has nothing to call.
#include <capstan/plugin.h>

extern "C" __attribute__((visibility("default"), used, section(".capstan_plugin")))
const capstan::PluginInfo capstan_plugin_info = {{'C', 'A', 'P', 'S', 'T', 'A', 'N', 0},
                                                 sizeof(capstan::PluginInfo),
                                                 capstan::core_epoch,
                                                 capstan::kind_epoch("tokenizer"),
                                                 "tokenizer",
                                                 "no_register",
                                                 "1.0.0",
                                                 CAPSTAN_TOOLCHAIN};
