// defines: GptFixture: GPTs made through the plugin host, placed on a device, and batches for them.
#pragma once
#include "plugin/host.h"

#include <capstan/batch.h>
#include <capstan/model.h>
#include <capstan/random.h>
#include <capstan/walk.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace capstan::test {

/// Option names and their values as YAML text; later ones replace earlier ones.
using Overrides = std::map<std::string, std::string>;

inline Overrides operator+(Overrides a, const Overrides& b) {
  for (const auto& [key, value] : b) a[key] = value;
  return a;
}

/// The published forms, at test size.
inline const Overrides gpt2_form{
    {"norm", "layer"}, {"positions", "learned"}, {"activation", "gelu"}, {"bias", "true"}, {"tied", "true"}};
inline const Overrides llama_form{
    {"norm", "rms"}, {"positions", "rope"}, {"activation", "swiglu"}, {"bias", "false"}, {"tied", "false"}};
inline const Overrides qwen_form = llama_form + Overrides{{"qk_norm", "true"}, {"tied", "true"}, {"rope_theta", "1000000"}};

class GptFixture : public testing::Test {
 protected:
  PluginHost host{CAPSTAN_PROGRAM};

  std::shared_ptr<Model> make(const Overrides& options) {
    const std::vector<std::pair<std::string, std::string>> list(options.begin(), options.end());
    return host.make_as<Model>(host.choice("model", "gpt", list));
  }

  /// Gives every parameter its initial values, plus noise of size `noise` so that norm weights and biases count too.
  static void place(Model& model, Device& device, DType dtype, double noise = 0, bool gradients = false) {
    for (Parameter* p : model.parameters()) {
      const Tensor values = Tensor::empty(p->shape(), dtype, device);
      p->initialize(17, values);
      if (noise > 0 && !values.is_meta()) {
        const Rng rng(18, p->name());
        std::vector<double> v(static_cast<std::size_t>(values.numel()));
        values.to(DType::f64).copy_to_host(v.data(), values.numel() * 8);
        for (std::size_t i = 0; i < v.size(); ++i) v[i] += noise * rng.normal(i);
        values.copy_from(Tensor::of<double>(v, p->shape(), device));
      }
      p->place(values, gradients);
    }
  }

  static std::vector<std::int32_t> tokens(std::int64_t count, std::int64_t vocabulary, std::uint64_t seed = 1) {
    const Rng rng(seed, "test/tokens");
    std::vector<std::int32_t> out;
    for (std::int64_t i = 0; i < count; ++i) {
      out.push_back(
          static_cast<std::int32_t>(rng.below(static_cast<std::uint64_t>(i), static_cast<std::uint64_t>(vocabulary))));
    }
    return out;
  }

  /// The memory of a tensor's values: equal only when every bit is.
  static std::vector<unsigned char> bits(const Tensor& t) {
    std::vector<unsigned char> out(static_cast<std::size_t>(t.bytes()));
    t.contiguous().copy_to_host(out.data(), t.bytes());
    return out;
  }

  static std::vector<double> values(const Tensor& t) {
    std::vector<double> out(static_cast<std::size_t>(t.numel()));
    t.detach().to(DType::f64).contiguous().copy_to_host(out.data(), t.numel() * 8);
    return out;
  }
};

}  // namespace capstan::test
