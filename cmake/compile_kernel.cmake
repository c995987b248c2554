# One .cu file to <OUT>.ptx, <OUT>.cubin and <OUT>.ptxas.txt, what ptxas says about each kernel:
# registers, spills, and the C75xx notes by which it tells that it serialized wgmma.
# Never -arch=sm_90a: it adds generic compute_90 PTX, which cannot hold wgmma.
#
# With JAXFP8_KERNEL_CACHE in the environment, a directory, what was compiled before is taken from
# there: kernels do not depend on the Python that a package is built for. The key is everything that
# goes in: sources, headers, the compiler's version, and this file.
cmake_path(GET OUT PARENT_PATH directory)
file(MAKE_DIRECTORY ${directory})
set(cached "")
if(DEFINED ENV{JAXFP8_KERNEL_CACHE})
  execute_process(COMMAND ${NVCC} --version OUTPUT_VARIABLE inputs COMMAND_ERROR_IS_FATAL ANY)
  cmake_path(GET CMAKE_CURRENT_LIST_FILE PARENT_PATH root)
  cmake_path(GET root PARENT_PATH root)
  file(GLOB_RECURSE headers ${root}/csrc/kernels/*.cuh ${root}/csrc/kernels/*.h ${root}/csrc/ptx/*.cuh)
  list(SORT headers)
  foreach(file IN LISTS headers ITEMS ${SOURCE} ${CMAKE_CURRENT_LIST_FILE})
    file(SHA256 ${file} hash)
    string(APPEND inputs ${hash})
  endforeach()
  string(SHA256 key "${inputs}")
  cmake_path(GET OUT FILENAME image)
  set(cached $ENV{JAXFP8_KERNEL_CACHE}/${image}-${key})
  if(EXISTS ${cached}.cubin)
    foreach(suffix IN ITEMS .cubin .ptx .ptxas.txt)
      file(COPY_FILE ${cached}${suffix} ${OUT}${suffix})
    endforeach()
    list(JOIN headers " " headers)
    file(WRITE ${OUT}.d "${OUT}.cubin: ${SOURCE} ${headers}\n")
    return()
  endif()
endif()
execute_process(
  COMMAND ${NVCC} -std=c++20 -O3 --ptx -gencode=arch=compute_90a,code=compute_90a
    --expt-relaxed-constexpr -MD -MF ${OUT}.d -MT ${OUT}.cubin -o ${OUT}.ptx ${SOURCE}
  COMMAND_ERROR_IS_FATAL ANY)
execute_process(
  COMMAND ${NVCC} -cubin -gencode=arch=compute_90a,code=sm_90a -Xptxas=-v,--warn-on-spills
    -o ${OUT}.cubin ${OUT}.ptx
  OUTPUT_VARIABLE report ERROR_VARIABLE report RESULT_VARIABLE failed)
file(WRITE ${OUT}.ptxas.txt "${report}")
if(failed)
  message(FATAL_ERROR "${report}")
endif()
string(REGEX MATCHALL "[^\n]*C75[0-9][0-9][^\n]*" notes "${report}")
foreach(note IN LISTS notes)
  message(WARNING "ptxas serializes wgmma in ${SOURCE}: ${note}")
endforeach()
if(cached)
  file(MAKE_DIRECTORY $ENV{JAXFP8_KERNEL_CACHE})
  foreach(suffix IN ITEMS .ptx .ptxas.txt .cubin) # the cubin last: it says that all are there
    file(COPY_FILE ${OUT}${suffix} ${cached}${suffix}.part)
    file(RENAME ${cached}${suffix}.part ${cached}${suffix})
  endforeach()
endif()
