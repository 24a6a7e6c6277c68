// defines: where things are in an .idx file (the table in indexed_dataset.h).
#pragma once
#include <cstdint>

namespace capstan::data::layout {

inline constexpr unsigned char magic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0};
inline constexpr std::int64_t version_at = 9, type_at = 17, sequences_at = 18, entries_at = 26, lengths_at = 34;

constexpr std::int64_t offsets_at(std::int64_t sequences) { return lengths_at + 4 * sequences; }
constexpr std::int64_t documents_at(std::int64_t sequences) { return lengths_at + 12 * sequences; }
constexpr std::int64_t index_bytes(std::int64_t sequences, std::int64_t documents) {
  return documents_at(sequences) + 8 * (documents + 1);
}

}  // namespace capstan::data::layout
