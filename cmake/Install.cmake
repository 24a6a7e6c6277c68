# What `cmake --install` writes, and the same package over the build tree, so that `capstan plugin new` and
# find_package(Capstan) work before anything is installed. Everything finds everything else by relative paths: the prefix may
# be moved.
include(CMakePackageConfigHelpers)
set(CAPSTAN_PACKAGE_INSTALL lib/cmake/Capstan)
set(CAPSTAN_BUILD_PACKAGE ${CMAKE_BINARY_DIR}/lib/cmake/Capstan)
set(CAPSTAN_PACKAGE_FILES ${CMAKE_CURRENT_LIST_DIR}/CapstanPlugin.cmake ${CMAKE_CURRENT_LIST_DIR}/plugin_exports.map)

# The program and what it needs to run. Not GNUInstallDirs' libdir: the program and its plugins find each other by
# ../lib in every installation.
install(TARGETS capstan_program RUNTIME DESTINATION bin COMPONENT program)
set_target_properties(capstan PROPERTIES INSTALL_RPATH "$ORIGIN")
install(TARGETS capstan EXPORT CapstanTargets
  LIBRARY DESTINATION lib COMPONENT program NAMELINK_COMPONENT development)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/recipes DESTINATION share/capstan COMPONENT program)
install(FILES ${PROJECT_SOURCE_DIR}/core/data/devices.yaml DESTINATION share/capstan COMPONENT program)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/core/data/bench DESTINATION share/capstan COMPONENT program)

# What a plugin author needs besides.
install(DIRECTORY ${PROJECT_SOURCE_DIR}/core/include/capstan ${PROJECT_SOURCE_DIR}/kernels/include/capstan
  DESTINATION include COMPONENT development FILES_MATCHING PATTERN "*.h")
install(DIRECTORY ${PROJECT_SOURCE_DIR}/core/templates DESTINATION share/capstan COMPONENT development)
install(EXPORT CapstanTargets NAMESPACE Capstan:: DESTINATION ${CAPSTAN_PACKAGE_INSTALL} COMPONENT development)
install(FILES ${CAPSTAN_PACKAGE_FILES} DESTINATION ${CAPSTAN_PACKAGE_INSTALL} COMPONENT development)

# Plugins are tied to core_epoch, which the program checks; the package only promises the same minor version.
write_basic_package_version_file(${CAPSTAN_BUILD_PACKAGE}/CapstanConfigVersion.cmake COMPATIBILITY SameMinorVersion)
set(CAPSTAN_PROGRAM_FOR_CONFIG "\${PACKAGE_PREFIX_DIR}/bin/capstan")
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/CapstanConfig.cmake.in
  ${CMAKE_BINARY_DIR}/CMakeFiles/CapstanConfig.cmake INSTALL_DESTINATION ${CAPSTAN_PACKAGE_INSTALL})
install(FILES ${CMAKE_BINARY_DIR}/CMakeFiles/CapstanConfig.cmake ${CAPSTAN_BUILD_PACKAGE}/CapstanConfigVersion.cmake
  DESTINATION ${CAPSTAN_PACKAGE_INSTALL} COMPONENT development)

# The build tree, laid out as the prefix is.
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/CapstanConfig.cmake.in ${CAPSTAN_BUILD_PACKAGE}/CapstanConfig.cmake
  INSTALL_DESTINATION ${CAPSTAN_PACKAGE_INSTALL} INSTALL_PREFIX ${CMAKE_BINARY_DIR})
export(EXPORT CapstanTargets NAMESPACE Capstan:: FILE ${CAPSTAN_BUILD_PACKAGE}/CapstanTargets.cmake)
foreach(file ${CAPSTAN_PACKAGE_FILES})
  configure_file(${file} ${CAPSTAN_BUILD_PACKAGE} COPYONLY)
endforeach()
file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/share/capstan)
foreach(folder ${PROJECT_SOURCE_DIR}/core/templates ${PROJECT_SOURCE_DIR}/recipes ${PROJECT_SOURCE_DIR}/core/data/devices.yaml
        ${PROJECT_SOURCE_DIR}/core/data/bench)
  get_filename_component(name ${folder} NAME)
  file(CREATE_LINK ${folder} ${CMAKE_BINARY_DIR}/share/capstan/${name} SYMBOLIC)
endforeach()
