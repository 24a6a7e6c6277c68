// defines: CAPSTAN_API, the mark of every symbol that core offers to plugins. All else is hidden.
#pragma once
#define CAPSTAN_API __attribute__((visibility("default")))
