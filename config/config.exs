import Config

# Nothing is required. On Linux, MLX is built in where the folder of an unpacked wheel is named
# here, or in the environment variable BOMBUS_MLX_DIR:
#
#     config :bombus, mlx_dir: "/opt/mlx"
