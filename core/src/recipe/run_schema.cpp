// The top level of every recipe that runs: what the trainer, the data builder and the engine read.
#include "recipe/run_schema.h"

#include "recipe/mesh_schema.h"

#include <fmt/format.h>

#include <string>

namespace capstan {
namespace {

using Type = OptionSpec::Type;

/// Of what is counted and then multiplied by a batch's size, or kept in an int.
constexpr double most_count = 1e9;

Schema run_group() {
  Schema s;
  s.path("dir", "", "folder of the run: checkpoints, metrics, samples; empty: runs/<name of the recipe file>");
  s.integer("seed", 1, "seed of everything random: initial weights, order of the data, dropout, samples").at_least(0);
  s.text("resume", "auto",
         "auto: continue where the folder's run stopped, if there is one; never: refuse a folder that holds "
         "a run; require: refuse a folder that holds none")
      .one_of({"auto", "never", "require"});
  s.integer("threads", 0, "CPU threads of each rank; 0: the cores of its host, shared out evenly over the ranks there").range(0, 4096);
  s.text("device", "cpu", "where tensors live and are computed with; cuda: an NVIDIA GPU; auto: the GPU when this machine has one that this build can use, else the CPU")
      .one_of({"cpu", "cuda", "auto"});
  s.list(OptionSpec::Type::integers, "gpus", "[]",
         "the GPUs of each host that are used, by CUDA's numbers: local rank r takes the r-th, and from the start again when there are "
         "more ranks; []: all that a process sees")
      .range(0, 4095);
  s.text("cuda_graphs", "auto",
         "whether a GPU replays a training step that was recorded once instead of being told each kernel anew, with the same bits; auto: where "
         "it can be; on: or else an error that says why not; off: never")
      .one_of({"auto", "on", "off"});
  s.text("attention_backward", "ordered",
         "the order in which a GPU sums attention's gradients; ordered: one order, the same bits at every run; free: another at every run, where "
         "cuDNN is faster so: no run then repeats or resumes to the bit. The CPU has one order either way")
      .one_of({"ordered", "free"});
  s.text("gemm_choice", "heuristic",
         "which of cuBLASLt's algorithms a GPU's matrix products take; heuristic: the library's first proposal; tuned: the fastest of its "
         "proposals, timed once for each kind of product and kept in gemm_file, so that whoever reads that file gets the same bits")
      .one_of({"heuristic", "tuned"});
  s.path("gemm_file", "", "the kept choices of gemm_choice: tuned; several runs and ranks may share one; empty: products.txt in the run's folder");
  return s;
}

Schema precision_group() {
  Schema s;
  s.text("compute", "f32",
         "type of weights and activations in forward and backward; under bf16 the optimizer keeps f32 "
         "master weights; f64 is for checking")
      .one_of({"f32", "f64", "bf16"});
  s.text("linear", "compute",
         "what linear layers multiply; compute: the type above; fp8: e4m3 with one scale a tensor, taken from its largest number; "
         "mxfp8: e4m3 with a scale for every 32 numbers (GPUs: from compute capability 10.0 on). Sums, results, gradients and master "
         "weights keep their types; embeddings, norms, attention, the head, and layers whose dimensions are not multiples of 16 (mxfp8: "
         "32) keep precision.compute; so does what writes text")
      .one_of({"compute", "fp8", "mxfp8"});
  s.text("linear_gradient", "e5m2", "fp8, mxfp8: format of the gradients that come back to linear layers; e5m2 has range, e4m3 has precision, which is enough range for mxfp8")
      .one_of({"e5m2", "e4m3"});
  return s;
}

Schema data_set() {
  Schema s;
  s.required(Type::path, "path", "the data set without .bin and .idx");
  s.number("weight", 1, "how often this set is drawn from, relative to the others").above(0);
  s.list(Type::paths, "text", "[]",
         "text files, folders or globs (** crosses folders) that the set is built from when it does "
         "not exist yet; a set that was built from others is refused");
  s.integer("max_bytes", 0, "most text to build from; 0: all of it").in("bytes").at_least(0);
  return s;
}

Schema data_group() {
  Schema s;
  auto& sets = s.groups("sets", data_set(), "the data sets to train on");
  sets.required = true;
  sets.default_text.clear();
  s.required(Type::integer, "sequence_length", "length of one training sequence").in("tokens").range(1, 1 << 24);
  s.required(Type::integer, "batch_size", "sequences in one optimizer step").in("sequences").range(1, 1 << 24);
  s.integer(
       "micro_batch", 0,
       "most sequences in one forward and backward; fewer need less memory and give the same result; 0: all of batch_size")
      .in("sequences")
      .range(0, 1 << 24);
  s.number("validation", 0.01, "share of the documents kept out of training, for the validation loss").range(0, 0.5);
  s.flag("attend_across_documents", false, "whether tokens see the documents packed before theirs into one sequence");
  s.integer("prefetch", 2, "batches made ready ahead of the step").in("batches").range(0, 1024);
  return s;
}

Schema schedule_group() {
  Schema s;
  s.integer("warmup", 0, "steps over which the learning rate rises from 0 to its peak").in("steps").at_least(0);
  s.text("decay", "cosine", "how it falls after warm-up; wsd: constant (stable), then a fall at the end")
      .one_of({"constant", "cosine", "linear", "wsd"});
  s.number("final", 0.1, "learning rate at the last step as a share of the peak").range(0, 1);
  s.integer("decay_steps", 0, "wsd: length of the fall; 0: a fifth of the run").in("steps").at_least(0);
  s.text("decay_shape", "linear", "wsd: shape of the fall; sqrt: 1 - sqrt of the share of the fall that is over")
      .one_of({"linear", "cosine", "sqrt", "exponential"});
  return s;
}

Schema train_group() {
  Schema s;
  s.required(Type::integer, "steps", "optimizer steps in the whole run").in("steps").range(1, 1e12);
  s.number("clip", 1, "largest global norm of the gradient, larger ones are scaled down to it; 0: no clipping").at_least(0);
  s.integer("validate_every", 0, "steps between validations; 0: never").in("steps").at_least(0);
  s.integer("validate_batches", 8, "batches in one validation").in("batches").range(1, most_count);
  s.integer("sample_every", 0, "steps between samples of what the model writes; 0: never").in("steps").at_least(0);
  s.text("sample_prompt", "", "what samples continue; empty: the start of a document");
  s.integer("sample_tokens", 128, "length of a sample").in("tokens").range(1, 1 << 20);
  s.text("on_nonfinite", "stop",
         "when loss or gradient is not finite, before it reaches the weights; stop: end the run with a "
         "message; skip: leave the step out; rollback: go back to the newest checkpoint")
      .one_of({"stop", "skip", "rollback"});
  s.number("spike_threshold", 0, "reports a loss this far above its running mean; 0: never")
      .in("standard deviations")
      .at_least(0);
  s.text("recompute", "none",
         "what backward computes again instead of keeping it; block: the activations inside of each block")
      .one_of({"none", "block"});
  s.integer("log_every", 1, "steps between lines of the log and of metrics.jsonl").in("steps").at_least(1);
  return s;
}

Schema checkpoint_group() {
  Schema s;
  s.plugin("checkpoint", "format", "hdf5", "how checkpoints are written");
  s.integer("every_steps", 0, "steps between checkpoints; 0: not by steps").in("steps").at_least(0);
  s.number("every_minutes", 0, "time between checkpoints; 0: not by time").in("minutes").at_least(0);
  s.integer("keep", 3, "newest checkpoints to keep; 0: all").range(0, most_count);
  s.flag("asynchronous", true, "write while training goes on, from a copy in memory");
  s.flag("at_end", true, "write one after the last step");
  s.text("on_damage", "fallback",
         "when the newest checkpoint is damaged; fallback: say so and take the newest good one; stop: "
         "end with a message")
      .one_of({"fallback", "stop"});
  return s;
}

}  // namespace

Schema run_schema() {
  Schema s;
  s.group("run", run_group(), "this run: where it goes, its seed, what it runs on");
  s.list(Type::paths, "plugin_path", "[]", "folders searched for plugins besides the installed ones; a name that two of them bring is an error that names both");
  s.group("precision", precision_group(), "number formats");
  s.plugin("model", "model", "", "what is trained");
  s.plugin("tokenizer", "tokenizer", "byte", "how text becomes tokens");
  s.group("data", data_group(), "what it is trained on, and in which pieces");
  s.plugin("optimizer", "optimizer", "adamw", "how gradients change the weights");
  s.group("schedule", schedule_group(), "the learning rate over the run, as a share of the optimizer's peak");
  s.group("train", train_group(), "the loop: its length and what it does on the way");
  s.group("checkpoint", checkpoint_group(), "what is saved, when and how");
  s.group("mesh", mesh_schema(), "how the ranks of a job share the work; without it all of them shard the model");
  s.plugin("inference", "inference", "basic", "what writes text: samples during training and `capstan generate`");
  return s;
}

void check_run_options(const Options& options) {
  check_mesh_options(options);
  const Options& precision = options.group("precision");
  if (precision.text("linear") != "compute" && precision.text("compute") == "f64")
    precision.refuse("linear", precision.text("linear") + " rounds to 8 bits what precision.compute=f64 is for; expected compute, or precision.compute f32 or bf16");
  const Options& data = options.group("data");
  if (data.groups("sets").empty())
    data.refuse("sets", "an empty list; expected one data set or more, such as [{path: ...}]");
  const Options& train = options.group("train");
  if (train.integer("validate_every") > 0 && data.number("validation") == 0) {
    train.refuse("validate_every",
                 fmt::format("validation every {} steps, but data.validation = 0 keeps no documents for it",
                             train.integer("validate_every")));
  }
  const Options& schedule = options.group("schedule");
  if (schedule.text("decay") == "wsd" && schedule.text("decay_shape") == "exponential" && schedule.number("final") == 0) {
    schedule.refuse("final",
                    "an exponential decay never reaches 0; expected a share above 0, or another schedule.decay_shape");
  }
  const Options& checkpoint = options.group("checkpoint");
  if (train.text("on_nonfinite") == "rollback" && checkpoint.integer("every_steps") == 0 &&
      checkpoint.number("every_minutes") == 0) {
    train.refuse("on_nonfinite",
                 "rollback needs checkpoints to go back to; set checkpoint.every_steps or checkpoint.every_minutes");
  }
}

}  // namespace capstan
