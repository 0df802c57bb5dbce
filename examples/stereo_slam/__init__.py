"""A small stereo SLAM on the matcher's topics. Only `node` needs ROS; `smoother`, `pose_graph` and `slam` do not."""
