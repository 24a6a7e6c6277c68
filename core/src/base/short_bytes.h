// defines: short_bytes(): a count of bytes, for people.
#pragma once
#include <capstan/export.h>

#include <string>

namespace capstan {

/// "3.40 GiB", "300 MiB", "2 KiB"
CAPSTAN_API std::string short_bytes(double bytes);

}  // namespace capstan
