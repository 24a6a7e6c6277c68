// defines: usable_threads(): what `threads: 0` comes to.
#pragma once

namespace capstan {

/// `threads` itself, or for 0 the cores that this process may run on.
int usable_threads(int threads);

}  // namespace capstan
