defmodule Mix.Tasks.Compile.BombusNative do
  @moduledoc """
  Builds the engine with cargo and puts it into `priv/native`.

  It runs when a source of the engine has changed: Rust, C++, CUDA's `.cu` and `.cuh`, or cargo's files.

  On a Mac, MLX is built with the engine. On Linux only cargo is needed, and the engine runs on the CPU.
  It has MLX too where the environment variable `BOMBUS_MLX_DIR`, or `config :bombus, mlx_dir: "..."`,
  names the folder of an unpacked wheel of MLX, which then stays linked until `mix clean`. `native/xtask`
  builds MLX's C layer once. The engine is optimized in every `MIX_ENV`.
  """

  use Mix.Task.Compiler

  @impl true
  def run(_args) do
    root = Path.dirname(Mix.Project.project_file())
    native = Path.join(root, "native")
    target = Path.join(root, "priv/native")
    library = Path.join(target, "bombus_nif.so")
    mlx = mlx_dir(target)

    if stale?(native, library) or linked_mlx(target) != mlx do
      File.mkdir_p!(target)
      announce(native)
      build(native, mlx_arguments(native, mlx))
      link_mlx(target, mlx)
      install(native, library)
      {:ok, []}
    else
      {:noop, []}
    end
  end

  @impl true
  def clean do
    File.rm_rf!(Path.join(Path.dirname(Mix.Project.project_file()), "priv/native"))
  end

  @doc false
  # Whether the library is older than what it is made of.
  def stale?(native, library), do: Mix.Utils.stale?(sources(native), [library])

  # The engine holds the text of CUDA's kernels: src has them, and `.*` finds them.
  defp sources(native) do
    patterns = ~w(Cargo.* */Cargo.toml */build.rs */cpp/* */src/**/*.*)
    Enum.flat_map(patterns, &Path.wildcard(Path.join(native, &1)))
  end

  defp mac?, do: match?({:unix, :darwin}, :os.type())

  # On a Mac mlx-rs builds MLX itself. Where nothing is named, what is linked already stays.
  defp mlx_dir(target) do
    named = [System.get_env("BOMBUS_MLX_DIR"), Application.get_env(:bombus, :mlx_dir)]
    dir = Enum.find(named, &(&1 not in [nil, ""])) || linked_mlx(target)

    if dir && not mac?() do
      dir = Path.expand(dir)
      File.exists?(Path.join(dir, "mlx/lib/libmlx.so")) || Mix.raise(not_mlx(dir))
      dir
    end
  end

  defp not_mlx(dir) do
    "expected BOMBUS_MLX_DIR, or config :bombus, :mlx_dir, to be the folder of an unpacked MLX " <>
      "wheel: there is no #{dir}/mlx/lib/libmlx.so"
  end

  defp mlx_arguments(_native, nil), do: if(mac?(), do: ~w(--features mlx), else: [])

  defp mlx_arguments(native, mlx) do
    out = Path.join(native, "target/mlx-c")
    cargo(native, ~w(run -p xtask -- mlx-c --mlx) ++ [mlx, "--out", out])
    ["--features", "mlx", "--config", Path.join(out, "config.toml")]
  end

  defp announce(native) do
    unless File.dir?(Path.join(native, "target/release")) do
      Mix.shell().info(
        "Building the engine with cargo: about five minutes on two cores, the first time"
      )
    end
  end

  defp build(native, arguments) do
    cargo(native, ~w(build --release -p bombus_nif) ++ arguments)
  end

  defp cargo(native, arguments) do
    System.find_executable("cargo") ||
      Mix.raise("Bombus needs Rust 1.91 or newer to compile: cargo is not on the PATH")

    # Where the results are looked for, whatever the environment says.
    env = [{"CARGO_TARGET_DIR", Path.join(native, "target")}]

    case System.cmd("cargo", arguments,
           env: env,
           cd: native,
           into: IO.stream(),
           stderr_to_stdout: true
         ) do
      {_output, 0} -> :ok
      {_output, status} -> Mix.raise("cargo #{hd(arguments)} failed with status #{status}")
    end
  end

  # Beside the NIF, in the wheel's layout, as links: `mix release` copies what they point to.
  defp link_mlx(_target, nil), do: :ok

  defp link_mlx(target, mlx) do
    for name <- mlx_parts(target), do: File.rm_rf!(Path.join(target, name))
    for name <- mlx_parts(mlx), do: File.ln_s!(Path.join(mlx, name), Path.join(target, name))
  end

  defp mlx_parts(folder) do
    folder
    |> Path.join("{mlx,mlx_*.libs,nvidia}")
    |> Path.wildcard()
    |> Enum.map(&Path.basename/1)
  end

  defp linked_mlx(target) do
    case File.read_link(Path.join(target, "mlx")) do
      {:ok, mlx} -> Path.dirname(mlx)
      {:error, _reason} -> nil
    end
  end

  # A new file under the name: the old one may be loaded in a running VM.
  defp install(native, library) do
    built =
      Enum.find(~w(libbombus_nif.so libbombus_nif.dylib), &File.exists?(release(native, &1)))

    File.rm(library)
    File.cp!(release(native, built), library)
    File.touch!(library)
    Bombus.Native.Library.warn_if_replaced(Path.rootname(library))
  end

  defp release(native, name), do: Path.join([native, "target/release", name])
end
