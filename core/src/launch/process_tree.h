// defines: kill_descendants(): ends all that this process started.
#pragma once

namespace capstan::launch {

/// SIGKILL to every descendant of this process, and to those that come to it when their parents die (it must be a subreaper
/// for that); reaps its children. Returns when none is left, after a second at most.
void kill_descendants();

}  // namespace capstan::launch
