// defines: InputFile, find_inputs(): which files a list of files, folders and patterns means; noted_input(), folder_of(),
// same_inputs(): such lists as a dataset's note keeps them.
#pragma once
#include <capstan/export.h>

#include <cstdint>
#include <string>
#include <vector>

namespace capstan::data {

struct InputFile {
  std::string path;
  std::int64_t bytes = 0;
};

/// Every regular file that `inputs` name, once each, sorted by path. A folder means all files below it; a
/// pattern has * ? [..] within a name and ** for any number of folders. Hidden names (.git) count only where
/// an input names them, and links to folders are not followed below a folder. An input that leads to nothing,
/// or to what cannot be read, is Error(input).
CAPSTAN_API std::vector<InputFile> find_inputs(const std::vector<std::string>& inputs);

/// An input as a dataset's note keeps it: absolute, without "." and "..".
CAPSTAN_API std::string noted_input(const std::string& input);
/// The folder of a dataset, likewise.
CAPSTAN_API std::string folder_of(const std::string& prefix);

/// Whether two lists name the same inputs in any order. Each path counts as it is or as seen from its dataset's folder, so that
/// a project may move as a whole.
CAPSTAN_API bool same_inputs(const std::vector<std::string>& a, const std::string& folder_a, const std::vector<std::string>& b,
                             const std::string& folder_b);

}  // namespace capstan::data
