// defines: on_ranks: a function on every rank of a world of threads; what each rank threw.
#pragma once
#include "comm/communicator.h"

#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace capstan::testing {

/// errors[r]: what rank r threw, "" for nothing. A rank that throws tells the others, as the program does.
inline std::vector<std::string> on_ranks(int size, double timeout, const std::function<void(World&)>& body) {
  auto worlds = make_thread_worlds(size, timeout);
  std::vector<std::string> errors(static_cast<std::size_t>(size));
  std::vector<std::thread> threads;
  for (int r = 0; r < size; ++r)
    threads.emplace_back([&, r] {
      const auto i = static_cast<std::size_t>(r);
      try {
        body(*worlds[i]);
      } catch (const std::exception& e) {
        errors[i] = e.what();
        worlds[i]->fail_job(e.what());
      }
      worlds[i].reset();
    });
  for (auto& t : threads) t.join();
  return errors;
}

}  // namespace capstan::testing
