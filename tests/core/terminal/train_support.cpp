// The training tests' helpers, for this test program too.
#include "core/train/support.cpp"
