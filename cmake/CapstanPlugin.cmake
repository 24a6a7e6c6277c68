# capstan_add_plugin(<name> KIND <kind> SOURCES <files...> [LINK <targets...>])
# Builds the shared library <kind>_<name>.so: target <kind>_<name>. It exports the two symbols of CAPSTAN_PLUGIN() and no
# others, and the system never unloads it. Within Capstan's own tree it lands where the program looks; elsewhere in the
# current build folder, where a recipe names it by path.
set(CAPSTAN_PLUGIN_EXPORTS ${CMAKE_CURRENT_LIST_DIR}/plugin_exports.map)

function(capstan_add_plugin name)
  cmake_parse_arguments(ARG "" "KIND" "SOURCES;LINK" ${ARGN})
  set(kinds model layer optimizer checkpoint tokenizer inference)
  if(NOT ARG_KIND OR NOT ARG_SOURCES)
    message(FATAL_ERROR "capstan_add_plugin(${name}): KIND and SOURCES are required")
  endif()
  if(NOT ARG_KIND IN_LIST kinds)
    message(FATAL_ERROR "capstan_add_plugin(${name}): there is no kind '${ARG_KIND}'; the kinds are: ${kinds}")
  endif()
  if(ARG_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "capstan_add_plugin(${name}): unknown words: ${ARG_UNPARSED_ARGUMENTS}")
  endif()
  set(target ${ARG_KIND}_${name})
  add_library(${target} MODULE ${ARG_SOURCES})
  target_link_libraries(${target} PRIVATE Capstan::capstan ${ARG_LINK})
  target_compile_features(${target} PRIVATE cxx_std_20)
  # No contraction of a * b + c: results must not depend on which compiler fused what.
  target_compile_options(${target} PRIVATE -ffp-contract=off)
  set_target_properties(${target} PROPERTIES PREFIX "" OUTPUT_NAME ${target} CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON CXX_EXTENSIONS OFF LINK_DEPENDS ${CAPSTAN_PLUGIN_EXPORTS})
  # Hidden visibility does not reach instantiations of the standard library's templates; the script does.
  # And a symbol that nobody defines is the linker's error, not that of the first run.
  target_link_options(${target} PRIVATE -Wl,-z,nodelete -Wl,-z,defs -Wl,--version-script=${CAPSTAN_PLUGIN_EXPORTS})
  if(TARGET capstan_flags)
    target_link_libraries(${target} PRIVATE capstan_flags)
    set_target_properties(${target} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CAPSTAN_PLUGIN_OUTPUT}
      INSTALL_RPATH "$ORIGIN/../..")
    install(TARGETS ${target} LIBRARY DESTINATION ${CAPSTAN_PLUGIN_INSTALL} COMPONENT program)
    set_property(GLOBAL APPEND PROPERTY CAPSTAN_PLUGIN_TARGETS ${target})
  else()
    set_target_properties(${target} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR})
  endif()
endfunction()
