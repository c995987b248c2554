#include "sum_rows.h"

#include <string>

#include "checks.h"

namespace jaxfp8 {

LaunchPlan plan_sum_rows(const SumRowsProblem& p, int device_sms) {
  LaunchPlan plan;
  plan.image = "sum_rows";
  plan.kernel = std::string("sum_rows_") + name(p.in) + "_" + name(p.out);
  const Grid grid = warps_grid("out", p.tokens, p.cols, p.in, device_sms);
  plan.grid.x = grid.ctas;
  plan.block.x = grid.threads;
  plan.args = {p.row_data, p.position, p.weight, p.out_data, p.tokens, p.choices, p.rows, p.cols};
  return plan;
}

}  // namespace jaxfp8
