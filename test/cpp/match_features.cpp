// Asks the service match_features to match the features of two images, as a SLAM front-end does for a loop closure.
//
//   match_features SERVICE REFERENCE.cdr CURRENT.cdr MATCHES.cdr [FOCAL CX CY]
//
// The first two files hold a serialised FeatureArray, the third one gets the MatchArray of the answer. With an intrinsic
// calibration, which holds for both images, there is a pose. What else is in the answer is printed, a line each.
//
// Exit status: 0, 1 where the answer is no success (stderr has its message), 2 where there is no answer.

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <kpmatch_ros/srv/match_features.hpp>
#include <rcutils/allocator.h>
#include <rcutils/strdup.h>
#include <rmw/error_handling.h>
#include <rmw/qos_profiles.h>
#include <rmw/rmw.h>
#include <rmw/serialized_message.h>
#include <rosidl_typesupport_cpp/message_type_support.hpp>
#include <rosidl_typesupport_cpp/service_type_support.hpp>

namespace
{

using kpmatch_ros::msg::FeatureArray;
using kpmatch_ros::msg::MatchArray;
using kpmatch_ros::srv::MatchFeatures;
using Clock = std::chrono::steady_clock;

constexpr auto PATIENCE = std::chrono::seconds(60);

void check(rmw_ret_t returned, const std::string & what)
{
  if (returned != RMW_RET_OK) {
    const std::string reason = rmw_get_error_string().str;
    rmw_reset_error();
    throw std::runtime_error(what + ": " + reason);
  }
}

FeatureArray read_features(const std::string & path)
{
  std::ifstream file(path, std::ios::binary);
  std::vector<std::uint8_t> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  auto serialized = rmw_get_zero_initialized_serialized_message();
  serialized.buffer = bytes.data();
  serialized.buffer_length = serialized.buffer_capacity = bytes.size();
  serialized.allocator = rcutils_get_default_allocator();
  FeatureArray features;
  check(
    rmw_deserialize(
      &serialized, rosidl_typesupport_cpp::get_message_type_support_handle<FeatureArray>(), &features), path);
  return features;
}

void write_matches(const MatchArray & matches, const std::string & path)
{
  auto allocator = rcutils_get_default_allocator();
  auto serialized = rmw_get_zero_initialized_serialized_message();
  check(rmw_serialized_message_init(&serialized, 0, &allocator), "memory");
  check(
    rmw_serialize(&matches, rosidl_typesupport_cpp::get_message_type_support_handle<MatchArray>(), &serialized), path);
  std::ofstream file(path, std::ios::binary);
  file.write(
    reinterpret_cast<const char *>(serialized.buffer), static_cast<std::streamsize>(serialized.buffer_length));
  check(rmw_serialized_message_fini(&serialized), "memory");
}

// A node with one client, by rmw alone: rclcpp cannot be had without a ROS installation.
class Client
{
public:
  explicit Client(const std::string & service)
  {
    auto options = rmw_get_zero_initialized_init_options();
    check(rmw_init_options_init(&options, allocator_), "options");
    options.enclave = rcutils_strdup("/", allocator_);
#if __has_include("rmw/discovery_options.h")
    options.discovery_options.automatic_discovery_range = RMW_AUTOMATIC_DISCOVERY_RANGE_LOCALHOST;
#endif  // Humble has no ranges of discovery
    const char * domain = std::getenv("ROS_DOMAIN_ID");
    options.domain_id = domain == nullptr ? 0 : std::stoul(domain);
    check(rmw_init(&options, &context_), "init");
    check(rmw_init_options_fini(&options), "options");
    node_ = rmw_create_node(&context_, "loop_closure", "/");
    const auto * type = rosidl_typesupport_cpp::get_service_type_support_handle<MatchFeatures>();
    client_ = node_ == nullptr ? nullptr : rmw_create_client(
      node_, type, service.c_str(), &rmw_qos_profile_services_default);
    check(client_ == nullptr ? RMW_RET_ERROR : RMW_RET_OK, "client");
  }

  Client(const Client &) = delete;
  Client & operator=(const Client &) = delete;

  ~Client()
  {
    if (rmw_destroy_client(node_, client_) != RMW_RET_OK || rmw_destroy_node(node_) != RMW_RET_OK ||
      rmw_shutdown(&context_) != RMW_RET_OK || rmw_context_fini(&context_) != RMW_RET_OK)
    {
      std::cerr << "match_features: the node did not end well\n";
    }
  }

  MatchFeatures::Response call(const MatchFeatures::Request & request)
  {
    const auto end = Clock::now() + PATIENCE;
    for (bool there = false; !there; wait(end, "no such service")) {
      check(rmw_service_server_is_available(node_, client_, &there), "service");
    }
    std::int64_t number = 0;
    check(rmw_send_request(client_, &request, &number), "request");
    MatchFeatures::Response response;
    rmw_service_info_t info;
    for (bool taken = false; !taken; wait(end, "no answer")) {
      check(rmw_take_response(client_, &info, &response, &taken), "response");
    }
    return response;
  }

private:
  static void wait(Clock::time_point end, const std::string & why)
  {
    if (Clock::now() > end) {
      throw std::runtime_error(why);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }

  rcutils_allocator_t allocator_ = rcutils_get_default_allocator();
  rmw_context_t context_ = rmw_get_zero_initialized_context();
  rmw_node_t * node_ = nullptr;
  rmw_client_t * client_ = nullptr;
};

int run(const std::vector<std::string> & words)
{
  MatchFeatures::Request request;
  request.reference_features = read_features(words[1]);
  request.features = read_features(words[2]);
  if (words.size() == 7) {
    auto & info = request.camera_info;
    const double focal = std::stod(words[4]);
    info.width = request.features.width;
    info.height = request.features.height;
    info.distortion_model = "plumb_bob";
    info.d.resize(5);
    info.k = {focal, 0, std::stod(words[5]), 0, focal, std::stod(words[6]), 0, 0, 1};
    request.reference_camera_info = info;
  }
  const auto response = Client(words[0]).call(request);
  if (!response.success) {
    std::cerr << response.message << '\n';
    return 1;
  }
  write_matches(response.matches, words[3]);
  const auto & pose = response.relative_pose;
  const auto & t = pose.pose.pose.position;
  const auto & q = pose.pose.pose.orientation;
  std::cout << "status " << +pose.status << "\nnum_matches " << pose.num_matches << "\nnum_inliers " <<
    pose.num_inliers << "\ntranslation " << t.x << ' ' << t.y << ' ' << t.z << "\nrotation " << q.x << ' ' << q.y <<
    ' ' << q.z << ' ' << q.w << '\n';
  return 0;
}

}  // namespace

int main(int argc, char ** argv)
{
  const std::vector<std::string> words(argv + 1, argv + argc);
  if (words.size() != 4 && words.size() != 7) {
    std::cerr << "usage: match_features SERVICE REFERENCE.cdr CURRENT.cdr MATCHES.cdr [FOCAL CX CY]\n";
    return 2;
  }
  try {
    return run(words);
  } catch (const std::exception & error) {
    std::cerr << "match_features: " << error.what() << '\n';
  }
  return 2;
}
