// The cost model: times of products, attention, streaming and collectives, and the file that holds its numbers.
#include "plan/device_model.h"

#include "recipe/recipe.h"

#include <capstan/error.h>
#include <capstan/options.h>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace capstan::plan {

std::string_view name_of(Collective collective) {
  switch (collective) {
    case Collective::all_gather: return "all-gather";
    case Collective::reduce_scatter: return "reduce-scatter";
    case Collective::all_reduce: return "all-reduce";
    default: return "send";
  }
}

double DeviceModel::peak(DType dtype) const {
  switch (dtype) {
    case DType::bf16: case DType::f16: return peak_bf16;
    case DType::f8e4m3: case DType::f8e5m2: return peak_f8;
    case DType::f64: return peak_f64;
    default: return peak_f32;
  }
}

double DeviceModel::product_efficiency(const Product& p) const {
  double share = product_share * p.k / (p.k + product_depth);
  // Part of a tile at the edge costs a whole one, and the last round of tiles leaves cores idle.
  const double tiles_m = std::ceil(p.m / tile_m), tiles_n = std::ceil(p.n / tile_n);
  share *= (p.m / tile_m) * (p.n / tile_n) / (tiles_m * tiles_n);
  if (cores <= 0) return share;
  const double tiles = tiles_m * tiles_n;
  if (tiles >= cores) return share * (tiles / cores) / std::ceil(tiles / cores);
  // Few tiles: libraries cut the inner dimension among the idle cores, down to about a thousand elements.
  const double cuts = std::clamp(p.k / 1024, 1.0, cores / tiles);
  return share * std::min(1.0, tiles * cuts / cores);
}

double DeviceModel::product(const Product& p, DType dtype, double bytes) const {
  if (p.m <= 0 || p.n <= 0 || p.k <= 0) return 0;
  return std::max(2 * p.m * p.n * p.k / (product_efficiency(p) * peak(dtype)), bytes / bandwidth) + op_seconds;
}

double DeviceModel::attention(double flop, double length, double head_size, bool backward, DType dtype) const {
  if (flop <= 0) return 0;
  const double at_128 = 128 / (128 + attention_head), head = std::min(1.2, head_size / (head_size + attention_head) / at_128);
  const double share = (backward ? attention_backward : attention_forward) * length / (length + (backward ? attention_length_backward : attention_length)) * head;
  // The scores are made again in the backward: five products instead of the four that the model asks for.
  return (backward ? 1.25 : 1.0) * flop / (share * peak(dtype)) + op_seconds;
}

double DeviceModel::streaming(double flop, double bytes, double calls) const { return std::max(bytes / bandwidth, flop / vector_peak) + calls * op_seconds; }

double DeviceModel::sent(Collective c, double bytes, const GroupShape& g) {
  if (c == Collective::send) return bytes;
  const double once = bytes * (g.size - 1) / g.size;
  return c == Collective::all_reduce ? 2 * once : once;
}

double DeviceModel::collective(Collective c, double bytes, const GroupShape& g) const {
  if (c != Collective::send && g.size <= 1) return 0;
  if (c == Collective::send) {
    const Link& link = g.hosts > 1 ? network : host;
    return bytes / link.bandwidth + link.latency;
  }
  // Every rank takes in all but its own part; all but its host's part comes over the host's adapters, of which the group has
  // one for each of its ranks there. Both happen at once: the slower counts.
  const double inside = g.per_host > 1 ? bytes * (g.size - 1) / g.size / host.bandwidth : 0;
  const double outside = g.hosts > 1 ? bytes * (g.hosts - 1) / g.hosts / (g.per_host * network.bandwidth) : 0;
  // A ring in the host; among many hosts libraries change to trees, whose depth is a logarithm.
  const double latency = (g.per_host - 1) * host.latency + (g.hosts > 1 ? std::ceil(std::log2(g.hosts)) * network.latency : 0);
  return (c == Collective::all_reduce ? 2 : 1) * (std::max(inside, outside) + latency);
}

namespace {

Schema link_schema() {
  Schema s;
  s.required(OptionSpec::Type::number, "bandwidth", "of one rank and direction, as large collectives reach it").in("bytes/s").above(0);
  s.required(OptionSpec::Type::number, "latency", "of a message of no length").in("seconds").at_least(0);
  return s;
}

Schema device_schema() {
  using Type = OptionSpec::Type;
  Schema s;
  s.required(Type::text, "name", "as --device says it");
  s.text("help", "", "what it is");
  s.required(Type::number, "memory", "that a run may use").in("bytes").above(0);
  s.required(Type::number, "bandwidth", "of memory, as streaming kernels reach it").in("bytes/s").above(0);
  for (const char* key : {"peak_bf16", "peak_f32", "peak_f64"})
    s.required(Type::number, key, "of matrix products, datasheet").in("flop/s").above(0);
  s.number("peak_f8", 0, "likewise; 0: it has none").in("flop/s").at_least(0);
  s.required(Type::number, "vector_peak", "outside of matrix products, f32").in("flop/s").above(0);
  s.required(Type::number, "product_share", "of the peak that a very large product reaches").above(0);
  s.number("product_depth", 0, "inner dimension at which a product has half of that").at_least(0);
  s.number("tile_m", 1, "rows of the output that a core makes at a time").at_least(1);
  s.number("tile_n", 1, "columns likewise").at_least(1);
  s.integer("cores", 0, "that tiles are dealt to; 0: no rounding to whole rounds").range(0, 1 << 20);
  s.required(Type::number, "attention_forward", "share of the peak on long sequences").above(0);
  s.required(Type::number, "attention_backward", "likewise").above(0);
  s.number("attention_length", 0, "of a sequence at which the forward has half of that").in("tokens").at_least(0);
  s.number("attention_length_backward", 0, "likewise").in("tokens").at_least(0);
  s.number("attention_head", 0, "elements of a head at which it has half").at_least(0);
  s.number("op_seconds", 0, "fixed, of each operation").in("seconds").at_least(0);
  s.number("collective_cores", 0, "that a collective takes from the compute beside it").at_least(0);
  s.integer("per_host", 1, "devices of one host").range(1, 1 << 20);
  s.group("host", link_schema(), "between devices of one host");
  s.group("network", link_schema(), "of each device to other hosts");
  return s;
}

}  // namespace

std::vector<DeviceModel> read_devices(const std::string& file) {
  std::ifstream in(file);
  std::stringstream text;
  text << in.rdbuf();
  if (!in) fail(Fault::input, file, "cannot read the table of devices; name another with --devices FILE");
  Schema schema;
  schema.groups("devices", device_schema(), "what a run may be planned for");
  const Options options = parse_options(schema, text.str(), nullptr, file);
  std::vector<DeviceModel> all;
  for (const Options& o : options.groups("devices")) {
    DeviceModel d;
    d.name = o.text("name"), d.help = o.text("help");
    d.memory = o.number("memory"), d.bandwidth = o.number("bandwidth");
    d.peak_bf16 = o.number("peak_bf16"), d.peak_f32 = o.number("peak_f32"), d.peak_f64 = o.number("peak_f64"), d.peak_f8 = o.number("peak_f8");
    d.vector_peak = o.number("vector_peak");
    d.product_share = o.number("product_share"), d.product_depth = o.number("product_depth");
    d.tile_m = o.number("tile_m"), d.tile_n = o.number("tile_n"), d.cores = static_cast<int>(o.integer("cores"));
    d.attention_forward = o.number("attention_forward"), d.attention_backward = o.number("attention_backward");
    d.attention_length = o.number("attention_length"), d.attention_length_backward = o.number("attention_length_backward");
    d.attention_head = o.number("attention_head");
    d.op_seconds = o.number("op_seconds"), d.collective_cores = o.number("collective_cores");
    d.per_host = static_cast<int>(o.integer("per_host"));
    d.host = {o.group("host").number("bandwidth"), o.group("host").number("latency")};
    d.network = {o.group("network").number("bandwidth"), o.group("network").number("latency")};
    if (d.cores > 0 && d.collective_cores >= d.cores) o.refuse("collective_cores", fmt::format("expected fewer than the {} cores", d.cores));
    all.push_back(std::move(d));
  }
  return all;
}

DeviceModel load_device(const std::string& file, const std::string& name) {
  std::string known;
  for (DeviceModel& d : read_devices(file)) {
    if (d.name == name) return std::move(d);
    known += (known.empty() ? "" : ", ") + d.name;
  }
  fail(Fault::input, "--device", fmt::format("there is no device '{}' in {}: expected one of {}", name, file, known));
}

std::string devices_file(const std::string& executable) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  const fs::path real = fs::canonical(executable, ignored);
  return ((ignored ? fs::path(executable) : real).parent_path().parent_path() / "share/capstan/devices.yaml").string();
}

}  // namespace capstan::plan
