// Reads one serialised kpmatch_ros message from stdin, checks what its subscribers rely on, and prints it as JSON.
//
//   read_message MatchArray|RelativePose|FeatureArray < message.cdr
//
// Exit status: 0, 1 for a message that breaks the contract (stderr names each rule), 2 for input that is no message.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <limits>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <kpmatch_ros/msg/feature_array.hpp>
#include <kpmatch_ros/msg/match_array.hpp>
#include <kpmatch_ros/msg/relative_pose.hpp>
#include <rcutils/allocator.h>
#include <rmw/error_handling.h>
#include <rmw/rmw.h>
#include <rmw/serialized_message.h>
#include <rosidl_typesupport_cpp/message_type_support.hpp>

namespace
{

using kpmatch_ros::msg::FeatureArray;
using kpmatch_ros::msg::MatchArray;
using kpmatch_ros::msg::RelativePose;

template<typename Message>
Message deserialize(std::vector<std::uint8_t> & bytes)
{
  auto serialized = rmw_get_zero_initialized_serialized_message();
  serialized.buffer = bytes.data();
  serialized.buffer_length = bytes.size();
  serialized.buffer_capacity = bytes.size();
  serialized.allocator = rcutils_get_default_allocator();

  Message message;
  const auto * type = rosidl_typesupport_cpp::get_message_type_support_handle<Message>();
  if (rmw_deserialize(&serialized, type, &message) != RMW_RET_OK) {
    const std::string reason = rmw_get_error_string().str;
    rmw_reset_error();
    throw std::runtime_error("the " + std::to_string(bytes.size()) + " bytes are no such message: " + reason);
  }
  return message;
}

// ---- the contract --------------------------------------------------------------------------------------------------

class Rules
{
public:
  void require(bool holds, std::string_view rule)
  {
    if (!holds) {
      broken_.emplace_back(rule);
    }
  }

  const std::vector<std::string> & broken() const {return broken_;}

private:
  std::vector<std::string> broken_;
};

template<typename Values>
bool all_finite(const Values & values)
{
  return std::all_of(values.begin(), values.end(), [](auto value) {return std::isfinite(value);});
}

template<typename Values>
bool all_within(const Values & values, typename Values::value_type low, typename Values::value_type high)
{
  return std::all_of(values.begin(), values.end(), [=](auto value) {return low <= value && value <= high;});
}

template<typename Values>
bool all_different(const Values & values)
{
  return std::set<typename Values::value_type>(values.begin(), values.end()).size() == values.size();
}

// Without the points that are no keypoints of their image.
std::vector<std::uint32_t> detected(const std::vector<std::uint32_t> & indices)
{
  std::vector<std::uint32_t> found;
  std::copy_if(
    indices.begin(), indices.end(), std::back_inserter(found),
    [](auto index) {return index != MatchArray::NOT_DETECTED;});
  return found;
}

bool all_below(const std::vector<std::uint32_t> & values, std::uint32_t bound)
{
  return std::all_of(values.begin(), values.end(), [=](auto value) {return value < bound;});
}

// The centre of the top-left pixel is (0, 0): the image reaches half a pixel beyond the outermost centres.
bool all_inside(const std::vector<float> & points, std::uint32_t width, std::uint32_t height)
{
  const std::array<double, 2> size{static_cast<double>(width), static_cast<double>(height)};
  for (std::size_t i = 0; i < points.size(); ++i) {
    if (!(-0.5 <= points[i] && points[i] <= size[i % 2] - 0.5)) {
      return false;
    }
  }
  return true;
}

bool is_one(double value)
{
  return std::abs(value - 1.0) < 1e-6;
}

// Row-major 6 x 6. Rounding may leave the two halves apart by a part in a billion.
bool is_covariance(const std::array<double, 36> & c)
{
  for (std::size_t i = 0; i < 6; ++i) {
    for (std::size_t j = 0; j <= i; ++j) {
      const double larger = std::sqrt(std::abs(c[7 * i] * c[7 * j]));
      if (c[7 * i] < 0.0 || std::abs(c[6 * i + j] - c[6 * j + i]) > 1e-9 * larger) {
        return false;
      }
    }
  }
  return true;
}

void check(const MatchArray & m, Rules & rules)
{
  const std::size_t count = m.scores.size();
  const bool stereo = m.pairing == MatchArray::STEREO;
  const bool requested = m.pairing == MatchArray::REQUESTED;
  rules.require(
    stereo || requested || m.pairing == MatchArray::CONSECUTIVE, "pairing is CONSECUTIVE, STEREO or REQUESTED");
  rules.require(m.points.size() == 2 * count, "points holds two numbers for each score");
  rules.require(m.reference_points.size() == 2 * count, "reference_points holds two numbers for each score");
  rules.require(m.indices.size() == count, "indices is as long as scores");
  rules.require(m.reference_indices.size() == count, "reference_indices is as long as scores");
  rules.require(
    m.track_ids.size() == (stereo || requested ? 0 : count), "track_ids is as long as scores for CONSECUTIVE, or empty");
  rules.require(m.sigmas.size() == count, "sigmas is as long as scores");
  rules.require(m.inliers.empty() || m.inliers.size() == count, "inliers is empty or as long as scores");

  rules.require(all_inside(m.points, m.width, m.height), "points lie in the current image");
  rules.require(
    all_inside(m.reference_points, m.reference_width, m.reference_height),
    "reference_points lie in the reference image");
  rules.require(all_below(detected(m.indices), m.num_keypoints), "indices are below num_keypoints");
  rules.require(
    all_below(detected(m.reference_indices), m.reference_num_keypoints),
    "reference_indices are below reference_num_keypoints");
  rules.require(all_different(detected(m.indices)), "a keypoint of the current image is matched once");
  rules.require(all_different(detected(m.reference_indices)), "a keypoint of the reference image is matched once");
  rules.require(all_different(m.track_ids), "track_ids differ within an image");
  rules.require(all_within(m.scores, 0.0F, 1.0F), "scores lie in [0, 1]");
  rules.require(
    all_finite(m.sigmas) && std::all_of(m.sigmas.begin(), m.sigmas.end(), [](auto sigma) {return sigma > 0;}),
    "sigmas are finite and positive");
  rules.require(all_within(m.inliers, 0, 1), "inliers are 0 or 1");
  rules.require(
    all_finite(std::array{m.extract_ms, m.match_ms}) && m.extract_ms >= 0 && m.match_ms >= 0,
    "extract_ms and match_ms are finite and not negative");
}

void check(const RelativePose & p, Rules & rules)
{
  const auto & t = p.pose.pose.position;
  const auto & q = p.pose.pose.orientation;
  const double distance = std::hypot(t.x, t.y, t.z);
  const bool has_translation = p.status == RelativePose::OK || p.status == RelativePose::AMBIGUOUS;
  const bool has_pose = has_translation || p.status == RelativePose::NO_TRANSLATION;

  rules.require(p.status <= RelativePose::AMBIGUOUS, "status is one of the constants");
  rules.require(
    all_finite(std::array{t.x, t.y, t.z, q.x, q.y, q.z, q.w}) && all_finite(p.pose.covariance) &&
    std::isfinite(p.median_parallax), "every number is finite");
  rules.require(is_one(std::sqrt(q.x * q.x + q.y * q.y + q.z * q.z + q.w * q.w)), "the quaternion has length one");
  rules.require(has_pose || is_one(std::abs(q.w)), "without a pose the rotation is the identity");
  if (!has_translation) {
    rules.require(distance <= 0.0, "without a translation t is zero");
  } else if (!p.metric) {
    rules.require(is_one(distance), "t is a unit vector where it is not metric");
  }
  rules.require(is_covariance(p.pose.covariance), "the covariance is symmetric, and no variance is negative");
  rules.require(has_pose || all_within(p.pose.covariance, 0.0, 0.0), "without a pose the covariance is zero");
  rules.require(
    p.status != RelativePose::INTERRUPTED || p.reference == std_msgs::msg::Header(),
    "an INTERRUPTED pose has no reference");
  rules.require(p.num_inliers <= p.num_matches, "num_inliers is at most num_matches");
}

void check(const FeatureArray & f, Rules & rules)
{
  const std::size_t count = f.scores.size();
  rules.require(f.points.size() == 2 * count, "points holds two numbers for each score");
  rules.require(all_inside(f.points, f.width, f.height), "points lie in the image");
  rules.require(all_finite(f.scores), "scores are finite");
  rules.require(
    f.descriptors.size() == count * f.descriptor_size, "descriptors holds descriptor_size numbers for each score");
  rules.require(all_finite(f.descriptors), "descriptors are finite");
}

// ---- JSON ----------------------------------------------------------------------------------------------------------

class JsonObject
{
public:
  explicit JsonObject(std::ostream & out) : out_(out) {out_ << '{';}
  JsonObject(const JsonObject &) = delete;
  JsonObject & operator=(const JsonObject &) = delete;
  ~JsonObject() {out_ << '}';}

  template<typename Value>
  JsonObject & add(std::string_view name, const Value & value);

private:
  std::ostream & out_;
  bool first_ = true;
};

template<typename Number, typename = std::enable_if_t<std::is_arithmetic_v<Number>>>
void write(std::ostream & out, Number number)
{
  if constexpr (std::is_same_v<Number, bool>) {
    out << (number ? "true" : "false");
  } else if constexpr (std::is_floating_point_v<Number>) {
    // As a double with all its digits, also for a float: readers get the very same number back.
    out << std::setprecision(std::numeric_limits<double>::max_digits10) << static_cast<double>(number);
  } else {
    out << +number;
  }
}

void write(std::ostream & out, const std::string & text)
{
  out << '"';
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out << '\\' << c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out << "\\u" << std::hex << std::setw(4) << std::setfill('0') << +c << std::dec;
    } else {
      out << c;  // UTF-8 passes through
    }
  }
  out << '"';
}

template<typename Iterator>
void write_list(std::ostream & out, Iterator begin, Iterator end)
{
  out << '[';
  for (auto item = begin; item != end; ++item) {
    if (item != begin) {
      out << ',';
    }
    write(out, *item);
  }
  out << ']';
}

template<typename Item>
void write(std::ostream & out, const std::vector<Item> & items)
{
  write_list(out, items.begin(), items.end());
}

template<typename Item, std::size_t Count>
void write(std::ostream & out, const std::array<Item, Count> & items)
{
  write_list(out, items.begin(), items.end());
}

void write(std::ostream & out, const builtin_interfaces::msg::Time & time)
{
  JsonObject(out).add("sec", time.sec).add("nanosec", time.nanosec);
}

void write(std::ostream & out, const std_msgs::msg::Header & header)
{
  JsonObject(out).add("stamp", header.stamp).add("frame_id", header.frame_id);
}

void write(std::ostream & out, const geometry_msgs::msg::Point & point)
{
  JsonObject(out).add("x", point.x).add("y", point.y).add("z", point.z);
}

void write(std::ostream & out, const geometry_msgs::msg::Quaternion & q)
{
  JsonObject(out).add("x", q.x).add("y", q.y).add("z", q.z).add("w", q.w);
}

void write(std::ostream & out, const geometry_msgs::msg::Pose & pose)
{
  JsonObject(out).add("position", pose.position).add("orientation", pose.orientation);
}

void write(std::ostream & out, const geometry_msgs::msg::PoseWithCovariance & pose)
{
  JsonObject(out).add("pose", pose.pose).add("covariance", pose.covariance);
}

void write(std::ostream & out, const MatchArray & m)
{
  JsonObject(out)
  .add("header", m.header).add("reference", m.reference).add("pairing", m.pairing)
  .add("width", m.width).add("height", m.height)
  .add("reference_width", m.reference_width).add("reference_height", m.reference_height)
  .add("num_keypoints", m.num_keypoints).add("reference_num_keypoints", m.reference_num_keypoints)
  .add("points", m.points).add("reference_points", m.reference_points)
  .add("indices", m.indices).add("reference_indices", m.reference_indices)
  .add("scores", m.scores).add("track_ids", m.track_ids).add("inliers", m.inliers)
  .add("layers", m.layers).add("reset", m.reset)
  .add("extract_ms", m.extract_ms).add("match_ms", m.match_ms)
  .add("extractor", m.extractor).add("matcher", m.matcher).add("sigmas", m.sigmas);
}

void write(std::ostream & out, const RelativePose & p)
{
  JsonObject(out)
  .add("header", p.header).add("reference", p.reference).add("pose", p.pose)
  .add("metric", p.metric).add("status", p.status)
  .add("num_matches", p.num_matches).add("num_inliers", p.num_inliers).add("median_parallax", p.median_parallax);
}

void write(std::ostream & out, const FeatureArray & f)
{
  JsonObject(out)
  .add("header", f.header).add("width", f.width).add("height", f.height)
  .add("points", f.points).add("scores", f.scores)
  .add("descriptor_size", f.descriptor_size).add("descriptors", f.descriptors).add("extractor", f.extractor);
}

template<typename Value>
JsonObject & JsonObject::add(std::string_view name, const Value & value)
{
  out_ << (first_ ? "" : ",") << '"' << name << "\":";
  first_ = false;
  write(out_, value);
  return *this;
}

// ---- the program ---------------------------------------------------------------------------------------------------

template<typename Message>
int read(std::vector<std::uint8_t> & bytes)
{
  const auto message = deserialize<Message>(bytes);
  Rules rules;
  check(message, rules);
  for (const auto & rule : rules.broken()) {
    std::cerr << "broken: " << rule << '\n';
  }
  if (!rules.broken().empty()) {
    return 1;
  }
  write(std::cout, message);
  std::cout << '\n';
  return 0;
}

}  // namespace

int main(int argc, char ** argv)
{
  try {
    const std::string type = argc == 2 ? argv[1] : "";
    std::vector<std::uint8_t> bytes{std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>()};
    if (type == "MatchArray") {
      return read<MatchArray>(bytes);
    }
    if (type == "RelativePose") {
      return read<RelativePose>(bytes);
    }
    if (type == "FeatureArray") {
      return read<FeatureArray>(bytes);
    }
    std::cerr << "usage: read_message MatchArray|RelativePose|FeatureArray < message.cdr\n";
  } catch (const std::exception & error) {
    std::cerr << "read_message: " << error.what() << '\n';
  }
  return 2;
}
