# One .cu file to <OUT>.ptx, <OUT>.cubin and <OUT>.ptxas.txt, what ptxas says about each kernel:
# registers, spills, and the C75xx notes by which it tells that it serialized wgmma.
# Never -arch=sm_90a: it adds generic compute_90 PTX, which cannot hold wgmma.
cmake_path(GET OUT PARENT_PATH directory)
file(MAKE_DIRECTORY ${directory})
execute_process(
  COMMAND ${NVCC} -std=c++17 -O3 --ptx -gencode=arch=compute_90a,code=compute_90a
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
