// Predictions in words and as JSON.
#include "plan/report.h"

#include "base/short_bytes.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <string_view>
#include <utility>

namespace capstan::plan {

namespace {

std::string time_words(double seconds) {
  if (seconds <= 0) return "0";
  if (seconds < 1e-3) return fmt::format("{:.0f} us", seconds * 1e6);
  if (seconds < 1) return fmt::format("{:.1f} ms", seconds * 1e3);
  return fmt::format("{:.3g} s", seconds);
}

std::string place_words(const GroupShape& g) {
  if (g.hosts == 1) return fmt::format("{} ranks of a host", g.size);
  return fmt::format("{} ranks on {} hosts", g.size, g.hosts);
}

/// Class, bytes: what is there.
std::vector<std::pair<std::string, std::int64_t>> classes(const Memory& m) {
  const std::vector<std::pair<std::string, std::int64_t>> all{
      {"parameters (masters)", m.engine.masters}, {"working copies", m.engine.working},         {"gradients", m.engine.gradients},
      {"optimizer state", m.engine.optimizer},    {"gathered parameters", m.engine.gather_pool}, {"whole gradients", m.engine.gradient_pool},
      {"weights in fp8", m.quantized},
      {"activations", m.activations},             {"logits", m.logits},                          {"checkpoint staging", m.staging},
      {"samples", m.sampling},                    {"validation", m.validation},                  {"bigram model", m.bigram}};
  std::vector<std::pair<std::string, std::int64_t>> present;
  for (const auto& c : all)
    if (c.second > 0) present.push_back(c);
  return present;
}

std::string_view note_of(std::string_view name) {
  if (name == "checkpoint staging") return "  of the host";
  if (name == "samples" || name == "validation") return "  instead of activations";
  if (name == "bigram model") return "  of the host, beside validation's batches";
  return "";
}

/// Whether what is on the host takes from the memory that is asked about. Without a device that is all there is.
bool in_host_memory(const DeviceModel* device) { return device == nullptr || device->name == "cpu"; }

std::string calls_words(const Memory& m, const Prediction& p, const Setting& s) {
  if (p.memory.size() <= 1) return "";
  return fmt::format(" (pipeline rank {} of {}: {} of the model's blocks, {} microbatches kept)", m.pipeline_rank, s.size("pp"), m.calls.size(), m.live);
}

}  // namespace

std::string to_text(const Prediction& p, const Setting& s, const DeviceModel* device, const std::vector<Advice>& advice) {
  std::string text;
  const auto line = [&]<class... A>(fmt::format_string<A...> form, A&&... a) { text += fmt::format(form, std::forward<A>(a)...) + "\n"; };
  const Memory& m = p.memory[p.worst];
  line("mesh        {}", s.layout.describe());
  line("step        {} sequences x {} tokens; each data rank: {} microbatch{} of {}", s.sequences, s.length, s.microbatches, s.microbatches == 1 ? "" : "es", s.micro);
  line("");
  line("memory of the fullest rank{}", calls_words(m, p, s));
  for (const auto& [name, bytes] : classes(m))
    line("  {:<22}{:>10}{}", name, short_bytes(double(bytes)), note_of(name));
  const double on_device = double(m.total(in_host_memory(device)));
  line("  {:<22}{:>10}", in_host_memory(device) ? "all" : "on the device", short_bytes(on_device));
  if (device != nullptr) {
    if (on_device <= device->memory) {
      line("  fits: {} has {}, {:.0f} % of it used", device->help, short_bytes(device->memory), 100 * on_device / device->memory);
    } else {
      line("  does not fit: {} has {}", device->help, short_bytes(device->memory));
      int shown = 0;
      for (const Advice& a : advice) {
        if (shown++ == 6) break;
        line("    {:<44} {}{}", a.key, short_bytes(a.bytes), a.fits ? ", fits" : "");
      }
    }
  }
  line("");
  if (p.traffic.empty()) {
    line("sent        nothing: one rank");
  } else {
    line("{:<16}{:<17}{:<15}{:>9}{:>12}{}  {}", "sent in a step", "what", "how", "calls", "bytes", p.timed ? "      time   waited for" : "", "among");
    for (const Traffic& t : p.traffic)
      line("  {:<14}{:<17}{:<15}{:>9.0f}{:>12}{}  {}", t.axes, t.what, name_of(t.collective), t.calls, short_bytes(t.bytes),
           p.timed ? fmt::format("{:>10}{:>13}", time_words(t.seconds), time_words(t.exposed)) : "", place_words(t.group));
  }
  if (!p.timed) return text;
  line("");
  line("predicted   {} a step on {} x {}", time_words(p.step), s.layout.world(), device->help);
  if (s.size("pp") > 1) line("bubble      {:.1f} % of the pipeline's time ({})", 100 * p.bubble, pipeline::name_of(s.pipeline.kind));
  line("waiting     {} for communication ({:.1f} %), {} for norm and update", time_words(p.exposed), 100 * p.exposed / p.step, time_words(p.optimizer));
  line("speed       {:.0f} tokens/s a rank, {:.4g} in all", p.tokens_per_rank, p.tokens_per_rank * s.layout.world());
  line("share       {:.1f} % of the peak ({:.4g} TFLOP/s of {:.4g}; {:.4g} GFLOP a token)", 100 * p.share_of_peak,
       p.model_flop_per_token * p.tokens_per_rank * 1e-12, device->peak(s.engine.compute) * 1e-12, p.model_flop_per_token * 1e-9);
  return text;
}

std::string to_json(const Prediction& p, const Setting& s, const DeviceModel* device, const std::vector<Advice>& advice) {
  using Json = nlohmann::ordered_json;
  Json mesh;
  for (const MeshAxis& a : s.layout.axes()) mesh[a.name] = a.size;
  Json j{{"ranks", s.layout.world()}, {"mesh", mesh}, {"parameters", p.parameters}, {"tokens", p.tokens}, {"microbatches", p.microbatches},
         {"model_flop_per_token", p.model_flop_per_token}};
  j["memory"] = Json::array();
  for (std::size_t i = 0; i < p.memory.size(); ++i) {
    const Memory& m = p.memory[i];
    j["memory"].push_back({{"pipeline_rank", m.pipeline_rank}, {"fullest", i == p.worst}, {"masters", m.engine.masters}, {"working", m.engine.working},
                           {"gradients", m.engine.gradients}, {"optimizer", m.engine.optimizer}, {"gather_pool", m.engine.gather_pool},
                           {"gradient_pool", m.engine.gradient_pool}, {"quantized", m.quantized}, {"activations", m.activations}, {"live_microbatches", m.live}, {"logits", m.logits},
                           {"staging", m.staging}, {"sampling", m.sampling}, {"validation", m.validation}, {"bigram", m.bigram}, {"total", m.total()}});
  }
  j["traffic"] = Json::array();
  for (const Traffic& t : p.traffic) {
    Json row{{"axes", t.axes}, {"what", t.what}, {"collective", name_of(t.collective)}, {"ranks", t.group.size}, {"hosts", t.group.hosts}, {"calls", t.calls}, {"bytes", t.bytes}};
    if (p.timed) row["seconds"] = t.seconds, row["exposed"] = t.exposed;
    j["traffic"].push_back(std::move(row));
  }
  if (device != nullptr) {
    const Memory& m = p.memory[p.worst];
    j["device"] = {{"name", device->name}, {"memory", device->memory}, {"fits", double(m.total(in_host_memory(device))) <= device->memory}};
    j["advice"] = Json::array();
    for (const Advice& a : advice) j["advice"].push_back({{"keys", a.key}, {"bytes", a.bytes}, {"fits", a.fits}});
  }
  if (p.timed)
    j["time"] = {{"step", p.step}, {"exposed", p.exposed}, {"optimizer", p.optimizer}, {"bubble", p.bubble}, {"tokens_per_rank", p.tokens_per_rank}, {"share_of_peak", p.share_of_peak}};
  return j.dump(2) + "\n";
}

}  // namespace capstan::plan
