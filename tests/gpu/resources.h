// defines: read_log(), read_table(), write_table(), compare(): what ptxas says of every kernel, and a committed table of it.
#pragma once
#include <cxxabi.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <istream>
#include <map>
#include <ostream>
#include <sstream>
#include <string>
#include <utility>

namespace kernel_resources {

struct Resources { int registers = 0, shared = 0, stack = 0, spilled = 0; };
using Kernels = std::map<std::pair<std::string, std::string>, Resources>;  // by architecture and name

/// "rms_norm_kernel<float, 4>" of a mangled name: no namespaces, no parameters.
inline std::string plain_name(const std::string& mangled) {
  int status = 0;
  char* text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string name = status == 0 && text != nullptr ? text : mangled;
  std::free(text);
  for (const std::string drop : {"capstan::kernels::cuda::", "capstan::kernels::", "(anonymous namespace)::"})
    for (std::size_t at; (at = name.find(drop)) != std::string::npos;) name.erase(at, drop.size());
  if (name.rfind("void ", 0) == 0) name.erase(0, 5);
  int depth = 0;  // the parameters begin at the first parenthesis outside of <>
  for (std::size_t i = 0; i < name.size(); ++i) {
    if (name[i] == '<') ++depth;
    if (name[i] == '>') --depth;
    if (name[i] == '(' && depth == 0) return name.substr(0, i);
  }
  return name;
}

/// The number before `unit` in a line of ptxas; 0 when it is not there.
inline int number_before(const std::string& line, const std::string& unit) {
  const std::size_t at = line.find(" " + unit);
  if (at == std::string::npos) return 0;
  std::size_t begin = at;
  while (begin > 0 && std::isdigit(static_cast<unsigned char>(line[begin - 1]))) --begin;
  return std::atoi(line.substr(begin, at - begin).c_str());
}

/// Adds what one compilation's log says.
inline void read_log(std::istream& file, Kernels& kernels) {
  std::string line;
  Resources* now = nullptr;
  while (std::getline(file, line)) {
    const std::string entry = "Compiling entry function '";
    if (const std::size_t at = line.find(entry); at != std::string::npos) {
      const std::size_t name = at + entry.size(), name_end = line.find('\'', name), chip = line.find('\'', name_end + 1);
      if (chip == std::string::npos) continue;
      now = &kernels[{line.substr(chip + 1, line.find('\'', chip + 1) - chip - 1), plain_name(line.substr(name, name_end - name))}];
    } else if (now != nullptr && line.find("bytes stack frame") != std::string::npos) {
      now->stack = std::max(now->stack, number_before(line, "bytes stack frame"));
      now->spilled = std::max(now->spilled, number_before(line, "bytes spill stores") + number_before(line, "bytes spill loads"));
    } else if (now != nullptr && line.find("registers") != std::string::npos) {
      now->registers = std::max(now->registers, number_before(line, "registers"));
      now->shared = std::max(now->shared, number_before(line, "bytes smem"));
    }
  }
}

inline Kernels read_table(std::istream& file, std::string& compiler) {
  Kernels kernels;
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind("# compiler: ", 0) == 0) compiler = line.substr(12);
    if (line.empty() || line[0] == '#') continue;
    std::istringstream words(line);
    std::string chip, name;
    Resources r;
    if (words >> chip >> r.registers >> r.shared >> r.stack && std::getline(words >> std::ws, name)) kernels[{chip, name}] = r;
  }
  return kernels;
}

inline void write_table(std::ostream& out, const Kernels& kernels, const std::string& compiler) {
  out << "# What every kernel takes, by ptxas: made by kernel_resources --write (docs/maintainers/gpu.md).\n# compiler: " << compiler
      << "\n# architecture, registers, bytes of static shared memory, bytes of stack, kernel\n";
  for (const auto& [key, r] : kernels) out << key.first << ' ' << r.registers << ' ' << r.shared << ' ' << r.stack << ' ' << key.second << '\n';
}

/// Kernels that grew, spill, are new or gone: each a line of `out`; those that shrank are lines too, and do not count.
inline int compare(const Kernels& found, const Kernels& known, std::ostream& out) {
  int wrong = 0;
  for (const auto& [key, r] : found) {
    const std::string name = key.second + " (" + key.first + ")";
    if (r.spilled > 0) ++wrong, out << name << ": spills " << r.spilled << " bytes\n";
    const auto at = known.find(key);
    if (at == known.end()) {
      ++wrong, out << name << ": not in the table; it takes " << r.registers << " registers, " << r.shared << " bytes shared, " << r.stack << " of stack\n";
      continue;
    }
    const auto number = [&](const char* what, int now, int before) {
      if (now > before) ++wrong;
      if (now != before) out << (now < before ? "  smaller: " : "") << name << ": " << what << ' ' << before << " -> " << now << '\n';
    };
    number("registers", r.registers, at->second.registers), number("shared bytes", r.shared, at->second.shared), number("stack bytes", r.stack, at->second.stack);
  }
  for (const auto& [key, r] : known)
    if (!found.contains(key)) ++wrong, out << key.second << " (" << key.first << "): in the table, not in the build\n";
  return wrong;
}

}  // namespace kernel_resources
