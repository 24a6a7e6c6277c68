// defines: InputFile, find_inputs(): which files a list of files, folders and patterns means.
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

}  // namespace capstan::data
