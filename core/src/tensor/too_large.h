// defines: TooLarge: a tensor of a size that no memory has. Who knows which recipe asked for it says where.
#pragma once
#include <capstan/error.h>
#include <capstan/export.h>

namespace capstan {

class CAPSTAN_API TooLarge : public Error {
 public:
  using Error::Error;
  ~TooLarge() override;
};

}  // namespace capstan
