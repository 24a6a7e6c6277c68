// defines: short_bytes(): a count of bytes, for people.
#pragma once
#include <capstan/export.h>

#include <string>

namespace capstan {

/// In three digits: "3.40 GiB", "300 MiB", "0.98 MiB", "512 B".
CAPSTAN_API std::string short_bytes(double bytes);

}  // namespace capstan
