// defines: mesh_schema(), check_mesh_options(), mesh_from(): the `mesh` block of a recipe and the layout that it means.
#pragma once
#include "mesh/layout.h"

#include <capstan/export.h>
#include <capstan/options.h>

namespace capstan {

/// The `mesh` block: how many ranks share what. The number of ranks itself comes from the launch, never from a recipe.
CAPSTAN_API Schema mesh_schema();

/// Keys of the block that contradict each other or the rest of the recipe, whatever the number of ranks. `options` are
/// those of the whole recipe. Error(input) at the key.
CAPSTAN_API void check_mesh_options(const Options& options);

/// The training mesh (pp, replicate, shard, context, tensor) that a recipe means over `world` ranks. `options` are those
/// of the whole recipe. Error(input) at the key that does not fit, with meshes that do.
CAPSTAN_API MeshLayout mesh_from(const Options& options, int world);

}  // namespace capstan
