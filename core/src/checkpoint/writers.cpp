#include "checkpoint/writers.h"

#include <nlohmann/json.hpp>

#include <numeric>

namespace capstan::checkpoint {

std::vector<std::string> Writers::gather(const std::string& mine) {
  if (!communicator_ || size() == 1) return {mine};
  const auto ranks = static_cast<std::size_t>(size());
  const auto length = static_cast<std::int64_t>(mine.size());
  std::vector<std::int64_t> lengths(ranks);
  communicator_->all_gather(&length, lengths.data(), 1, DType::i64).wait();
  std::string all(static_cast<std::size_t>(std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0})), '\0');
  communicator_->all_gather_v(mine.data(), all.data(), lengths, DType::u8).wait();
  std::vector<std::string> texts;
  std::size_t at = 0;
  for (const std::int64_t n : lengths) texts.push_back(all.substr(at, static_cast<std::size_t>(n))), at += static_cast<std::size_t>(n);
  return texts;
}

std::string Writers::from_first(const std::string& mine) {
  if (!communicator_ || size() == 1) return mine;
  auto length = static_cast<std::int64_t>(mine.size());
  communicator_->broadcast(&length, 1, DType::i64, 0).wait();
  std::string text = first() ? mine : std::string(static_cast<std::size_t>(length), '\0');
  communicator_->broadcast(text.data(), length, DType::u8, 0).wait();
  return text;
}

void Writers::agree(const std::optional<Error>& failure) {
  if (size() == 1) {
    if (failure) throw Error(*failure);
    return;
  }
  const std::string mine = failure ? std::to_string(static_cast<int>(failure->fault())) + failure->what() : "";
  const std::vector<std::string> all = gather(mine);
  std::string text;
  Fault fault = Fault::runtime;
  for (std::size_t r = 0; r < all.size(); ++r) {
    if (all[r].empty()) continue;
    if (text.empty()) fault = static_cast<Fault>(all[r][0] - '0');
    text += (text.empty() ? "rank " : "; rank ") + std::to_string(r) + ": " + all[r].substr(1);
  }
  if (!text.empty()) throw Error(fault, text);
}

std::string to_text(const ShardReport& report) {
  nlohmann::json j{{"file", report.file}, {"bytes", report.bytes}, {"xxh3", report.xxh3}, {"tensors", nlohmann::json::array()}};
  for (const SavedTensor& t : report.tensors)
    j["tensors"].push_back({t.name, static_cast<int>(t.dtype), t.global_shape, t.box.begin, t.box.extent, t.bytes, t.xxh3, t.file, t.file_offset});
  return j.dump();
}

ShardReport shard_report_from(const std::string& text) {
  const auto j = nlohmann::json::parse(text);
  ShardReport r;
  j.at("file").get_to(r.file), j.at("bytes").get_to(r.bytes), j.at("xxh3").get_to(r.xxh3);
  for (const auto& row : j.at("tensors")) {
    SavedTensor t;
    row[0].get_to(t.name);
    t.dtype = static_cast<DType>(row[1].get<int>());
    row[2].get_to(t.global_shape), row[3].get_to(t.box.begin), row[4].get_to(t.box.extent);
    row[5].get_to(t.bytes), row[6].get_to(t.xxh3), row[7].get_to(t.file), row[8].get_to(t.file_offset);
    r.tensors.push_back(std::move(t));
  }
  return r;
}

}  // namespace capstan::checkpoint
