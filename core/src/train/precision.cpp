// precision.linear against the device and the model's shapes.
#include "train/precision.h"

#include "mesh/placement.h"
#include "ops/linear_fp8.h"
#include "train/machine.h"

#include <kernels/backend.h>
#include <kernels/types.h>

#include <fmt/format.h>

#include <string>
#include <vector>

namespace capstan::train {

namespace {

struct Layers {
  std::int64_t narrow = 0;
  std::vector<std::string> others;
};

/// The model's linear layers by whether this rank's part of their weights fits.
Layers layers_of(const Session& session, const LinearPrecision& precision) {
  Layers layers;
  const int tensor = session.mesh ? session.mesh->size("tensor") : 1,
            rank = session.mesh ? session.mesh->coordinate("tensor") : 0;
  for (const Parameter* p : session.model->parameters()) {
    if (!p->spec().linear) continue;
    const Dims local = tensor > 1 ? place_tensor(*p, tensor, rank).local : p->shape();
    if (ops::fits_fp8(precision, local))
      ++layers.narrow;
    else
      layers.others.push_back(p->name() + " " + to_string(local));
  }
  return layers;
}

}  // namespace

LinearPrecision linear_precision(const Options& options) {
  const Options& p = options.group("precision");
  LinearPrecision linear;
  linear.kind = p.text("linear") == "fp8"     ? LinearPrecision::Kind::fp8
                : p.text("linear") == "mxfp8" ? LinearPrecision::Kind::mxfp8
                                              : LinearPrecision::Kind::compute;
  linear.gradient = p.text("linear_gradient") == "e4m3" ? DType::f8e4m3 : DType::f8e5m2;
  return linear;
}

void check_precision(const Session& session, bool here) {
  const LinearPrecision precision = linear_precision(session.options());
  if (!precision.narrow()) return;
  const Options& options = session.options().group("precision");
  const auto scaling = precision.kind == LinearPrecision::Kind::mxfp8 ? kernels::Scaling::block : kernels::Scaling::tensor;
  const std::string problem = here ? session.device->backend().fp8_problem(scaling) : "";
  if (!problem.empty()) options.refuse("linear", options.text("linear") + ": " + problem);
  const Layers layers = layers_of(session, precision);
  if (layers.narrow == 0)
    options.refuse("linear", fmt::format("{}: none of the model's {} linear layers has dimensions that are multiples of "
                                         "{}{}; expected other widths, or precision.linear=compute",
                                         options.text("linear"), layers.others.size(), ops::fp8_multiple(precision),
                                         layers.others.empty() ? "" : " (the first: " + layers.others.front() + ")"));
}

std::string describe_precision(const Session& session) {
  const Options& options = session.options().group("precision");
  const LinearPrecision precision = linear_precision(session.options());
  std::string text = options.text("compute");
  if (!precision.narrow()) return text;
  text += fmt::format(", linear layers in {} (e4m3, gradients {})", options.text("linear"), options.text("linear_gradient"));
  const Layers layers = layers_of(session, precision);
  if (layers.others.empty()) return text;
  text += fmt::format(", but for {} of {} whose dimensions are not multiples of {}: {}", layers.others.size(),
                      layers.narrow + static_cast<std::int64_t>(layers.others.size()), ops::fp8_multiple(precision),
                      layers.others.front());
  if (layers.others.size() > 1) text += fmt::format(" and {} more", layers.others.size() - 1);
  return text;
}

ProductRate measure_products(const Session& session, const Estimate& estimate) {
  Device& device = *session.device;
  if (device.kind() != DeviceKind::cuda) return {measure_gemm_rate(device, DType::f32), ""};
  const DType compute = session.engine_options(true).compute;
  const double rate = measure_gemm_rate(device, compute), share = estimate.fp8_flop / estimate.step_flop;
  if (!(share > 0)) return {rate, ""};
  const double narrow = measure_gemm_rate(device, DType::f8e4m3);
  return {1 / (share / narrow + (1 - share) / rate),
          fmt::format(", {:.0f}% of them in fp8 at {:.0f} (one scale a matrix), the others in {} at {:.0f}", 100 * share,
                      narrow * 1e-9, name_of(compute), rate * 1e-9)};
}

}  // namespace capstan::train
