// A library with none of the functions that are asked for.
extern "C" __attribute__((visibility("default"))) int something_else() { return 1; }
