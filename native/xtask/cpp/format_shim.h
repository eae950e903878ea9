// Force-included where the standard library has no std::format (gcc 12): mlx-c 0.7.0
// uses it for five error messages, with plain `{}` placeholders only.
#pragma once
#include <sstream>
#include <string>
#include <string_view>
#include <version>

#ifndef __cpp_lib_format
namespace std {
inline string format(string_view text) { return string(text); }

template <typename First, typename... Rest>
string format(string_view text, const First& first, const Rest&... rest) {
  const auto hole = text.find("{}");
  if (hole == string_view::npos) return string(text);
  ostringstream out;
  out << text.substr(0, hole) << first << format(text.substr(hole + 2), rest...);
  return out.str();
}
} // namespace std
#endif
