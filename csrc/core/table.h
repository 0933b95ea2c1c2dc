// One row of a table of tensors, as torch operators receive it: int64 [tensors, kTableColumns] (dynfed_lightning.ops.Layout).
#pragma once
#include "macros.h"

namespace dynfed {

enum TableColumn : int {
  kTableStart,    // where the tensor begins in a flat vector; ignored where each tensor comes on its own
  kTableLength,   // its number of values
  kTableBits,     // 1 to 8
  kTableBucket,   // a positive multiple of 8
  kTableOffset,   // the global index of its first value, a multiple of 8
  kTablePacked,   // where its codes begin in the arena of codes, in bytes
  kTableScales,   // where its scales begin in the arena of scales
  kTableColumns,
};

}  // namespace dynfed
