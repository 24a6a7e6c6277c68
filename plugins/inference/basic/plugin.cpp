// The inference plugin "basic".
#include "engine.h"

#include <capstan/plugin.h>

CAPSTAN_PLUGIN("inference", "basic", "1.0.0") {
  capstan::Schema schema;
  schema.integer("max_tokens_held", 16384, "room for keys and values, over all requests").at_least(64).in("tokens");
  schema.integer("max_batch_tokens", 512, "rows of one forward: decoded tokens and chunks of prompts together")
      .at_least(1)
      .in("tokens");
  schema.integer("max_batch", 32, "requests in progress at once").at_least(1);
  schema.text("cuda_graphs", "auto",
              "whether a GPU replays a step in which every request decodes one token, recorded once for each power of two of requests, with the "
              "same results; auto: where it can be; on: or else an error that says why not; off: never")
      .one_of({"auto", "on", "off"});
  registrar.add("inference", "basic", schema, [](const capstan::Options& o, capstan::Registrar&) {
    const capstan::basic::EngineOptions options{o.integer("max_tokens_held"), o.integer("max_batch_tokens"),
                                                o.integer("max_batch"), o.text("cuda_graphs") != "off", o.text("cuda_graphs") == "on",
                                                o.where("cuda_graphs")};
    return capstan::as_interface<capstan::InferenceEngine>(std::make_shared<capstan::basic::BasicEngine>(options));
  });
}
