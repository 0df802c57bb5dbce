#!/bin/bash
# What the containers run: launch arguments start the node (image:=/camera/image_raw); `healthy` asks whether it is
# active; any other words are a command (kpmatch doctor).
set -eo pipefail
for setup in "/opt/ros/$ROS_DISTRO/setup.bash" "/opt/ros/$ROS_DISTRO/install/setup.bash"; do
  if [ -f "$setup" ]; then source "$setup"; fi
done
source /workspace/install/local_setup.bash
case "${1-}" in
  healthy)
    ros2 lifecycle get "${KPMATCH_NAMESPACE:+/$KPMATCH_NAMESPACE}/matcher" 2>&1 | grep -q '^active'
    ;;
  "" | *:=*)
    exec ros2 launch kpmatch_ros matcher.launch.py namespace:="${KPMATCH_NAMESPACE-}" "$@"
    ;;
  *)
    exec "$@"
    ;;
esac
