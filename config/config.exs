import Config

# Nothing is required. On Linux the folder of an unpacked MLX wheel can be named here instead of
# in the environment variable BOMBUS_MLX_DIR:
#
#     config :bombus, mlx_dir: "/opt/mlx"
