// The key function of the plugin kind "checkpoint": its type information lives in core, once.
#include <capstan/checkpoint.h>

namespace capstan {
CheckpointFormat::~CheckpointFormat() = default;
}  // namespace capstan
