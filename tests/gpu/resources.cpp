// `kernel_resources FOLDER TABLE COMPILER [--write]`: what ptxas said of every kernel (FOLDER's *.ptxas, kept as objects are
// compiled) against a committed table. A kernel that takes more registers, shared memory or stack than the table says, one
// that spills, one that the table does not know and one that is gone are errors. --write makes the table anew.
// Exit code 77: there is no table, or it is another compiler's: nothing was compared.
#include "resources.h"

#include <filesystem>
#include <fstream>
#include <iostream>

int main(int argc, char** argv) {
  namespace fs = std::filesystem;
  using namespace kernel_resources;
  if (argc < 4) {
    std::cerr << "kernel_resources FOLDER TABLE COMPILER [--write]\n";
    return 2;
  }
  const fs::path folder = argv[1], table = argv[2];
  const std::string compiler = argv[3];
  Kernels found;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    if (entry.path().extension() != ".ptxas") continue;
    std::ifstream log(entry.path());
    read_log(log, found);
  }
  if (found.empty()) {
    std::cerr << "no kernel in " << folder << ": expected the *.ptxas that compiling leaves there\n";
    return 1;
  }
  if (argc > 4 && std::string(argv[4]) == "--write") {
    std::ofstream out(table);
    write_table(out, found, compiler);
    std::cout << found.size() << " kernels written to " << table.string() << '\n';
    return out ? 0 : 1;
  }
  const std::string anew = std::string(argv[0]) + " " + folder.string() + " " + table.string() + " " + compiler + " --write";
  std::ifstream file(table);
  if (!file) {
    std::cout << "there is no table " << table.string() << ", nothing compared; to make it: " << anew << '\n';
    return 77;
  }
  std::string made_by;
  const Kernels known = read_table(file, made_by);
  if (made_by != compiler) {
    std::cout << table.string() << " was made by nvcc " << made_by << ", this build by " << compiler << ": nothing compared\n";
    return 77;
  }
  const int wrong = compare(found, known, std::cout);
  std::cout << found.size() << " kernels, " << wrong << " grown, spilling, new or gone\n";
  if (wrong > 0) std::cout << "if that is meant: " << anew << '\n';
  return wrong == 0 ? 0 : 1;
}
