// The tables of `capstan bench gpu`.
#include "bench/table.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace capstan::bench {

double Limits::of(const Bound& bound) const {
  if (!bound.product) return copy;
  const auto found = products.find(*bound.product);
  return found == products.end() ? 0 : found->second;
}

double StepRow::ratio() const {
  return peer && peer->tokens_per_second > 0 ? tokens_per_second / peer->tokens_per_second : 0;
}

double Table::share(const Row& row) const {
  const double limit = limits.of(row.bound);
  return limit > 0 ? row.rate() / limit : 0;
}

std::string Table::limits_text() const {
  std::string out = fmt::format("{:<58} {:>10.0f} GB/s\n", "copy, read and written", limits.copy * 1e-9);
  for (const auto& [dtype, rate] : limits.products) out += fmt::format("{:<58} {:>10.1f} TFLOP/s\n", "product, " + std::string(name_of(dtype)), rate * 1e-12);
  return out;
}

std::string Table::head_text(const std::string& part) { return fmt::format("{:<58} {:>10} {:>18} {:>9}\n", part, "us", "rate", "of limit"); }

std::string Table::text(const Row& row) const {
  if (!row.problem.empty()) return fmt::format("{:<58} failed: {}\n", row.name, row.problem);
  const std::string rate = row.bound.product ? fmt::format("{:.1f} TFLOP/s", row.rate() * 1e-12) : fmt::format("{:.0f} GB/s", row.rate() * 1e-9);
  const std::string of = limits.of(row.bound) > 0 ? fmt::format("{:.1f} %", 100 * share(row)) : "-";
  const double unit = row.bound.product ? 1e12 : 1e9;
  const std::string beside = row.reference.rate > 0 ? fmt::format("   {}: {:.0f}", row.reference.of, row.reference.rate / unit) : "";
  return fmt::format("{:<58} {:>10.1f} {:>18} {:>9}{}\n", row.name, row.seconds * 1e6, rate, of, beside);
}

std::string Table::steps_head_text() {
  return fmt::format("{:<26} {:<9} {:>10} {:>10} {:>8} {:>8} {:>10}   {}\n", "training step", "type", "tokens/s", "TFLOP/s", "of peak", "busy", "peak MiB", "beside it");
}

std::string Table::text(const StepRow& row) {
  if (!row.problem.empty()) return fmt::format("{:<26} {:<9} failed: {}\n", row.model, row.precision, row.problem);
  std::string peer = "alone";
  if (row.peer) {
    peer = row.peer->problem.empty() ? fmt::format("{}: {:.0f} tokens/s ({:.2f}x), {:.0f} MiB", row.peer->engine, row.peer->tokens_per_second, row.ratio(), row.peer->peak_mib)
                                     : row.peer->engine + " failed: " + row.peer->problem;
  }
  const std::string busy = row.busy_share > 0 ? fmt::format("{:.1f} %", 100 * row.busy_share) : "-";
  return fmt::format("{:<26} {:<9} {:>10.0f} {:>10.1f} {:>6.1f} % {:>8} {:>10.0f}   {}\n", row.model, row.precision, row.tokens_per_second, row.flops * 1e-12, 100 * row.peak_share,
                     busy, row.peak_mib, peer);
}

std::string Table::text() const {
  std::string out = device + "\n";
  if (limits.copy > 0) out += limits_text();
  std::string part;
  for (const Row& row : rows) {
    if (row.part != part) out += head_text(part = row.part);
    out += text(row);
  }
  if (!steps.empty()) out += steps_head_text();
  for (const StepRow& row : steps) out += text(row);
  return out;
}

std::string Table::json() const {
  using Json = nlohmann::ordered_json;
  Json limit{{"copy_bytes_per_s", limits.copy}}, all = Json::array(), whole = Json::array();
  for (const auto& [dtype, rate] : limits.products) limit["product_flops"][std::string(name_of(dtype))] = rate;
  for (const Row& row : rows) {
    Json j{{"part", row.part}, {"name", row.name}};
    if (row.problem.empty()) {
      j["microseconds"] = row.seconds * 1e6;
      j[row.bound.product ? "flops" : "bytes_per_s"] = row.rate();
      if (limits.of(row.bound) > 0) j["share"] = share(row);
      if (row.reference.rate > 0) j["reference"] = {{row.bound.product ? "flops" : "bytes_per_s", row.reference.rate}, {"of", row.reference.of}};
    } else {
      j["problem"] = row.problem;
    }
    all.push_back(std::move(j));
  }
  for (const StepRow& row : steps) {
    Json j{{"model", row.model}, {"precision", row.precision}};
    if (row.problem.empty()) {
      j["tokens_per_s"] = row.tokens_per_second, j["flops"] = row.flops, j["peak_share"] = row.peak_share, j["peak_mib"] = row.peak_mib;
      if (row.busy_share > 0) j["busy_share"] = row.busy_share;
    } else {
      j["problem"] = row.problem;
    }
    if (row.peer) {
      Json p{{"engine", row.peer->engine}};
      if (row.peer->problem.empty()) {
        p["tokens_per_s"] = row.peer->tokens_per_second, p["peak_mib"] = row.peer->peak_mib;
        if (row.ratio() > 0) p["ratio"] = row.ratio();
      } else {
        p["problem"] = row.peer->problem;
      }
      j["peer"] = std::move(p);
    }
    whole.push_back(std::move(j));
  }
  return Json{{"device", device}, {"limits", limit}, {"rows", all}, {"steps", whole}}.dump();
}

}  // namespace capstan::bench
