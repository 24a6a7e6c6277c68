// defines: Link, DeviceModel, GroupShape, load_device(): how long work takes on a device and between devices, on paper.
#pragma once
#include <capstan/dtype.h>
#include <capstan/export.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace capstan::plan {

/// One direction of what joins a rank to others: bytes per second that collectives of large messages reach, and the
/// seconds that a message of no length takes.
struct Link { double bandwidth = 0, latency = 0; };

/// Where the ranks of a group are: `size` of them on `hosts` hosts, at most `per_host` on one.
struct GroupShape {
  int size = 1, hosts = 1, per_host = 1;
  bool operator==(const GroupShape&) const = default;
};

enum class Collective : std::uint8_t { all_gather, reduce_scatter, all_reduce, send };
CAPSTAN_API std::string_view name_of(Collective collective);

/// A product [m, k] x [k, n].
struct Product { double m = 0, n = 0, k = 0; };

/// A device and its links, as devices.yaml describes them (core/data/devices.yaml says where each number is from). Times
/// in seconds. Everything is a roofline: the larger of arithmetic at the rate that its shape reaches and bytes at the
/// memory's, plus a fixed time for each operation.
struct CAPSTAN_API DeviceModel {
  std::string name, help;
  double memory = 0;             ///< bytes that a run may use
  double bandwidth = 0;          ///< bytes/s that streaming kernels reach
  double peak_bf16 = 0, peak_f32 = 0, peak_f64 = 0, peak_f8 = 0;  ///< flop/s of matrix products, datasheet
  double vector_peak = 0;        ///< flop/s outside of matrix products, f32
  double product_share = 1;      ///< of the peak that a very large product reaches
  double product_depth = 0;      ///< k at which a product's inner loop has half of that
  double tile_m = 1, tile_n = 1; ///< of the output, one core's work at a time
  int cores = 0;                 ///< that tiles are dealt to; 0: no rounding to whole rounds
  double attention_forward = 1, attention_backward = 1;  ///< share of the peak that long sequences reach
  double attention_length = 0, attention_length_backward = 0;  ///< tokens of a sequence at which it is half of that
  double attention_head = 0;     ///< elements of a head at which it is half
  double op_seconds = 0;         ///< fixed, of each operation
  double collective_cores = 0;   ///< that a collective takes from the compute beside it
  int per_host = 1;              ///< ranks of one host
  Link host, network;            ///< between ranks of one host; of each rank to other hosts

  double peak(DType dtype) const;
  /// Share of the peak that products of this shape reach.
  double product_efficiency(const Product& p) const;
  /// Seconds of one product of `dtype`; `bytes`: read and written.
  double product(const Product& p, DType dtype, double bytes) const;
  /// Seconds of causal attention's `flop` over sequences of `length` tokens.
  double attention(double flop, double length, double head_size, bool backward, DType dtype) const;
  /// Seconds of anything else, made of `calls` operations.
  double streaming(double flop, double bytes, double calls) const;
  /// Seconds of a collective whose whole buffer has `bytes` (what every rank has after an all-gather and before a
  /// reduce-scatter; for send: the message).
  double collective(Collective c, double bytes, const GroupShape& group) const;
  /// Bytes that each rank sends in it.
  static double sent(Collective c, double bytes, const GroupShape& group);
  /// How much longer compute takes while a collective runs beside it.
  double slowdown() const { return cores > 0 ? cores / (cores - collective_cores) : 1; }
};

/// All devices of a file. Error(input) with file and line.
CAPSTAN_API std::vector<DeviceModel> read_devices(const std::string& file);
/// The device `name` of that file. Error(input) listing those that there are.
CAPSTAN_API DeviceModel load_device(const std::string& file, const std::string& name);
/// devices.yaml of the installation (or build tree) that `executable` belongs to.
CAPSTAN_API std::string devices_file(const std::string& executable);

}  // namespace capstan::plan
