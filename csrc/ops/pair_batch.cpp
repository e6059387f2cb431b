// SPDX-License-Identifier: Apache-2.0
#include <pair_batch.h>

namespace flashmetric {

namespace {

constexpr int64_t kIgnoredWord = std::numeric_limits<int64_t>::min();

int64_t word_count(const Tensor& labels) { return labels.dim() == 1 ? 1 : labels.size(1); }

void check_labels(const Tensor& x, const Tensor& labels, int64_t words, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2, name, ": 2 dimensions expected, got ", x.dim());
  STD_TORCH_CHECK(x.size(0) < std::numeric_limits<int32_t>::max() - kMaxBlockRows, name,
                  ": fewer than 2^31 rows expected, got ", x.size(0));
  STD_TORCH_CHECK((labels.dim() == 1 || labels.dim() == 2) && labels.size(0) == x.size(0), name,
                  " labels: shape [N] or [N, words] expected, N the rows");
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, name, " labels: int64 expected");
  STD_TORCH_CHECK(word_count(labels) == words && words > 0, name, " labels: ", words,
                  " words per row expected, got ", word_count(labels));
}

GroupRule parse_groups(char c, const std::string& name) {
  if (c == 'a') return GroupRule::kAny;
  if (c == 's') return GroupRule::kSame;
  if (c == 'd') return GroupRule::kDifferent;
  STD_TORCH_CHECK(false, "rule: 'group:' and two of 'a', 's', 'd' expected, got '", name, "'");
}

bool allowed_alone(GroupRule rule) { return rule != GroupRule::kDifferent; }

}  // namespace

LabelRule parse_rule(const std::string& name) {
  if (name == "equal") return {Rule::kEqual};
  if (name == "any") return {Rule::kAny};
  STD_TORCH_CHECK(name.size() == 8 && name.compare(0, 6, "group:") == 0,
                  "rule: 'equal', 'any' or 'group:PN' expected, got '", name, "'");
  return {Rule::kGroup, parse_groups(name[6], name), parse_groups(name[7], name)};
}

void check_pairs(const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
                 const OptionalTensor& ref_labels, const std::string& rule) {
  const int64_t words = parse_rule(rule).rule == Rule::kGroup ? 2 : word_count(labels);
  check_labels(query, labels, words, "query");
  STD_TORCH_CHECK(ref.has_value() == ref_labels.has_value(),
                  "ref and ref_labels: both or neither expected");
  if (!ref.has_value()) return;
  check_labels(*ref, *ref_labels, words, "ref");
  STD_TORCH_CHECK(ref->size(1) == query.size(1), "ref: ", query.size(1), " columns expected, got ",
                  ref->size(1));
  STD_TORCH_CHECK(ref->scalar_type() == query.scalar_type(), "ref: the dtype of query expected");
}

LabelTables::LabelTables(const Tensor& labels, const OptionalTensor& ref_labels,
                         const LabelRule& rule, int64_t panel_width)
    : words_(word_count(labels)) {
  const bool self = !ref_labels.has_value();
  const Tensor own = as_contiguous(labels);
  const Tensor other = self ? own : as_contiguous(*ref_labels);
  const auto prepare = [&](Table& table, const Tensor& t) {
    table.rows = t.size(0);
    const size_t padded = static_cast<size_t>(round_up(table.rows, panel_width));
    table.classes.assign(padded, kPaddingClass);
    if (rule.rule == Rule::kGroup) table.groups.assign(padded, kPaddingClass);
    if (rule.rule == Rule::kAny) {
      table.words.assign(padded * static_cast<size_t>(words_), 0);
      const int64_t* p = data<int64_t>(t);
      for (int64_t i = 0; i < table.rows; ++i)
        for (int64_t w = 0; w < words_; ++w)
          table.words[static_cast<size_t>(w) * padded + static_cast<size_t>(i)] = p[i * words_ + w];
    }
  };
  prepare(query_, own);
  if (!self) prepare(ref_, other);
  const auto assign = [&](bool to_groups, int64_t word) {
    const int64_t m = other.size(0);
    ClassTable table(m), joined(word > 0 && !to_groups ? m : 0);
    const auto number = [&](Table& side, const Tensor& t, bool insert) {
      const int64_t* p = data<int64_t>(t);
      for (int64_t i = 0; i < side.rows; ++i) {
        const size_t at = static_cast<size_t>(i);
        int32_t& out = to_groups ? side.groups[at] : side.classes[at];
        if (p[i * words_] == kIgnoredWord) {
          out = kIgnoredClass;
          continue;
        }
        const int64_t label = p[i * words_ + word];
        const int32_t id = insert ? table.insert(label) : table.find(label);
        if (word == 0 || to_groups) {
          out = id;
        } else if (id < 0 || out < 0) {
          out = kAbsentClass;
        } else {
          // Of the words so far and of this one together.
          const int64_t both = int64_t{out} << 32 | id;
          out = insert ? joined.insert(both) : joined.find(both);
        }
      }
    };
    number(self ? query_ : ref_, other, true);
    if (!self) number(query_, own, false);
  };
  if (rule.rule == Rule::kAny) {
    const auto mark = [&](Table& side, const Tensor& t) {
      const int64_t* p = data<int64_t>(t);
      for (int64_t i = 0; i < side.rows; ++i)
        side.classes[static_cast<size_t>(i)] = p[i * words_] == kIgnoredWord ? kIgnoredClass : 0;
    };
    mark(query_, own);
    if (!self) mark(ref_, other);
  } else if (rule.rule == Rule::kGroup) {
    assign(false, 0);
    assign(true, 1);
  } else {
    for (int64_t w = 0; w < words_; ++w) assign(false, w);
  }
}

std::vector<int64_t> LabelTables::count(const LabelRule& rule, bool self, bool of_refs) const {
  const Table& rows = of_refs ? ref_ : query_;
  const Table& refs = self || of_refs ? query_ : ref_;
  const bool grouped = rule.rule == Rule::kGroup;
  std::vector<int64_t> by_class, by_group, by_both;
  const auto add = [](std::vector<int64_t>& histogram, int32_t id) {
    if (static_cast<size_t>(id) >= histogram.size()) histogram.resize(static_cast<size_t>(id) + 1);
    ++histogram[static_cast<size_t>(id)];
  };
  const auto at = [](const std::vector<int64_t>& histogram, int32_t id) -> int64_t {
    const size_t place = static_cast<size_t>(id);
    return id < 0 || place >= histogram.size() ? 0 : histogram[place];
  };
  ClassTable both(grouped ? refs.rows : 0);
  const auto joined = [](int32_t of_class, int32_t of_group) {
    return int64_t{of_class} << 32 | of_group;
  };
  int64_t total = 0;
  for (size_t j = 0; j < static_cast<size_t>(refs.rows); ++j) {
    const int32_t of_class = refs.classes[j], of_group = grouped ? refs.groups[j] : kAbsentClass;
    if (of_class == kIgnoredClass) continue;
    ++total;
    if (of_class >= 0) add(by_class, of_class);
    if (of_group >= 0) add(by_group, of_group);
    if (of_class >= 0 && of_group >= 0) add(by_both, both.insert(joined(of_class, of_group)));
  }
  const size_t n = static_cast<size_t>(rows.rows);
  std::vector<int64_t> counts(2 * n, 0);
  for (size_t i = 0; i < n; ++i) {
    const int32_t own = rows.classes[i];
    if (own == kIgnoredClass) continue;
    const int64_t same = at(by_class, own);
    counts[i] = same;
    counts[n + i] = total - same;
    if (grouped) {
      const int32_t group = rows.groups[i];
      const int64_t same_both =
          own < 0 || group < 0 ? 0 : at(by_both, both.find(joined(own, group)));
      const int64_t other_class = at(by_group, group) - same_both;
      if (rule.positive == GroupRule::kSame) counts[i] = same_both;
      if (rule.positive == GroupRule::kDifferent) counts[i] -= same_both;
      if (rule.negative == GroupRule::kSame) counts[n + i] = other_class;
      if (rule.negative == GroupRule::kDifferent) counts[n + i] -= other_class;
    }
    if (self && (!grouped || allowed_alone(rule.positive))) --counts[i];
  }
  return counts;
}

}  // namespace flashmetric
