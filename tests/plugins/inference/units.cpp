// The engine plugin's units that know nothing of models, compiled into this test: a plugin exports none of its symbols.
#include "plugins/inference/basic/sampler.cpp"
#include "plugins/inference/basic/text_stream.cpp"
