// A library that cannot be opened: what it needs is nowhere that the loader looks.
extern "C" int something_else();
extern "C" __attribute__((visibility("default"))) int capstan_nccl_open() { return something_else(); }
