# capstan_add_plugin(<name> KIND <kind> SOURCES <files...> [LINK <targets...>])
# A shared library with hidden symbols that the host never unloads. In the build tree it goes where the
# program looks; out of the tree it goes to the current build folder.
function(capstan_add_plugin name)
  cmake_parse_arguments(ARG "" "KIND" "SOURCES;LINK" ${ARGN})
  if(NOT ARG_KIND OR NOT ARG_SOURCES)
    message(FATAL_ERROR "capstan_add_plugin(${name}): KIND and SOURCES are required")
  endif()
  set(target ${ARG_KIND}_${name})
  add_library(${target} MODULE ${ARG_SOURCES})
  target_link_libraries(${target} PRIVATE Capstan::capstan ${ARG_LINK})
  target_compile_features(${target} PRIVATE cxx_std_20)
  set_target_properties(${target} PROPERTIES PREFIX "" OUTPUT_NAME ${target} CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON CXX_EXTENSIONS OFF)
  target_link_options(${target} PRIVATE -Wl,-z,nodelete)
  if(TARGET capstan_flags)
    target_link_libraries(${target} PRIVATE capstan_flags)
    set_target_properties(${target} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CAPSTAN_PLUGIN_OUTPUT}
      INSTALL_RPATH "$ORIGIN/../..")
    install(TARGETS ${target} LIBRARY DESTINATION ${CAPSTAN_PLUGIN_INSTALL})
    set_property(GLOBAL APPEND PROPERTY CAPSTAN_PLUGIN_TARGETS ${target})
  endif()
endfunction()
