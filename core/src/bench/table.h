// defines: Limits, Reference, Row, StepRow, Table: what `capstan bench gpu` found, as text and as JSON.
#pragma once
#include <capstan/dtype.h>
#include <capstan/export.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

namespace capstan::bench {

/// What holds a kernel back: bytes through memory, or products of a type.
struct CAPSTAN_API Bound {
  std::optional<DType> product;  ///< none: memory
  static Bound memory() { return {}; }
  static Bound products(DType dtype) { return {dtype}; }
};

/// What this device does at most, as measured in the same call.
struct CAPSTAN_API Limits {
  double copy = 0;                   ///< bytes a second of a large copy, read and written
  std::map<DType, double> products;  ///< FLOP a second of a large product
  /// 0 when it was not measured.
  double of(const Bound& bound) const;
};

/// What somebody else measured of the same work, elsewhere.
struct CAPSTAN_API Reference {
  double rate = 0;  ///< bytes or FLOP a second; 0: there is none
  std::string of;   ///< whose, and on what
};

/// One measured piece of work.
struct CAPSTAN_API Row {
  std::string part, name;
  Bound bound;
  double amount = 0;   ///< bytes or FLOP of one call
  double seconds = 0;  ///< of one call; 0: it failed
  std::string problem;
  Reference reference = {};
  double rate() const { return seconds > 0 ? amount / seconds : 0; }
};

/// Whole training steps of one recipe.
struct CAPSTAN_API StepRow {
  std::string model, precision;
  double tokens_per_second = 0, flops = 0, peak_share = 0, peak_mib = 0;
  std::string problem;
  double busy_share = 0;  ///< of a GPU's time, 0 to 1; 0: not measured
  struct Peer {
    std::string engine;
    double tokens_per_second = 0, peak_mib = 0;
    std::string problem;
  };
  std::optional<Peer> peer;  ///< none: there was none to run
  /// Tokens a second over the peer's; 0 when either is missing.
  double ratio() const;
};

struct CAPSTAN_API Table {
  std::string device;
  Limits limits;
  std::vector<Row> rows;
  std::vector<StepRow> steps;
  /// Share of its limit, 0 to 1; 0 when that was not measured.
  double share(const Row& row) const;
  std::string limits_text() const;
  static std::string head_text(const std::string& part);
  std::string text(const Row& row) const;
  static std::string steps_head_text();
  static std::string text(const StepRow& row);
  /// Everything, under the headings that the parts have while they run.
  std::string text() const;
  std::string json() const;
};

}  // namespace capstan::bench
