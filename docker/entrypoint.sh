#!/bin/bash
# What the containers run: launch arguments start the node (image:=/camera/image_raw); `healthy` asks whether it is
# active; any other words are a command (kpmatch doctor).
set -eo pipefail
for setup in "/opt/ros/$ROS_DISTRO/setup.bash" "/opt/ros/$ROS_DISTRO/install/setup.bash"; do
  if [ -f "$setup" ]; then source "$setup"; fi
done
source /workspace/install/local_setup.bash
# The namespace without slashes at its ends: users write front, /front and /front/.
shopt -s extglob
namespace=${KPMATCH_NAMESPACE-}
namespace=${namespace##+(/)}
namespace=${namespace%%+(/)}
case "${1-}" in
  healthy)
    ros2 lifecycle get "${namespace:+/$namespace}/matcher" 2>&1 | grep -q '^active'
    ;;
  "" | *:=*)
    # ros2 launch refuses an argument without a value.
    exec ros2 launch kpmatch_ros matcher.launch.py ${namespace:+"namespace:=$namespace"} "$@"
    ;;
  *)
    exec "$@"
    ;;
esac
