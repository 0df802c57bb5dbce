"""A small stereo SLAM on the matcher's topics: `smoother` and `pose_graph` without ROS, `node` with it."""
