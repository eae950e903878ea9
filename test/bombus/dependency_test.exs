defmodule Bombus.DependencyTest do
  # Bombus as another application's dependency: compiled, run under a supervisor, packed as a
  # release, moved, and run again; as it was built here, and on Linux without MLX.
  use ExUnit.Case, async: true

  @moduletag :tmp_dir
  @moduletag timeout: 600_000
  @root Path.expand("../..", __DIR__)

  defp write(dir, files) do
    for {name, text} <- files do
      path = Path.join(dir, name)
      File.mkdir_p!(Path.dirname(path))
      File.write!(path, text)
    end
  end

  defp app(bombus) do
    %{
      "mix.exs" => """
      defmodule Posts.MixProject do
        use Mix.Project

        def project do
          [app: :posts, version: "0.1.0", deps: [{:bombus, path: #{inspect(bombus)}}]]
        end

        def application, do: [extra_applications: [:logger], mod: {Posts, []}]
      end
      """,
      "lib/posts.ex" => """
      defmodule Posts do
        use Application

        def start(_type, _arguments) do
          model = Bombus.load_model!(:demo)
          serving = Bombus.Serving.new(model, Bombus.load_tokenizer!(:demo), max_new_tokens: 60)
          children = [{Bombus.Serving, serving: serving, name: Posts.LLM}]
          Supervisor.start_link(children, strategy: :one_for_one)
        end

        def write(topic) do
          %{results: [%{text: text}]} =
            Bombus.Serving.batched_run(Posts.LLM, "Write a post about " <> topic)

          IO.puts("POST: " <> text)
        end
      end
      """
    }
  end

  defp run(dir, command, arguments, env) do
    {output, status} =
      System.cmd(command, arguments, cd: dir, env: env, stderr_to_stdout: true)

    assert status == 0, "#{command} #{Enum.join(arguments, " ")}:\n#{output}"
    output
  end

  test "it compiles, runs, and moves with a release", %{tmp_dir: dir} do
    loaded = run_and_release(dir, @root, [])
    if Bombus.Fixtures.mlx?(), do: assert(Enum.any?(loaded, &(&1 =~ "libmlx")))
  end

  if match?({:unix, :linux}, :os.type()) do
    test "the same without MLX, from cargo alone", %{tmp_dir: dir} do
      env = [{"BOMBUS_MLX_DIR", nil}, {"LIBCLANG_PATH", nil}]
      loaded = run_and_release(dir, package(), env)
      refute Enum.any?(loaded, &(&1 =~ "libmlx"))
    end
  end

  # The package's files at a place of their own, where cargo finds what it has built before.
  defp package do
    package = Path.join(@root, "_build/without_mlx/bombus")
    File.mkdir_p!(Path.join(package, "native"))
    files = ~w(lib config mix.exs priv/models native/Cargo.toml native/Cargo.lock
               native/bombus native/bombus_nif native/jinja native/xtask)

    for file <- files do
      target = Path.join(package, file)
      File.rm_rf!(target)
      File.mkdir_p!(Path.dirname(target))
      {"", 0} = System.cmd("cp", ["-Rp", Path.join(@root, file), target])
    end

    link = Path.join(package, "native/target")
    File.exists?(link) || File.ln_s!(Path.join(@root, "native/target"), link)
    package
  end

  # -> the libraries that the release has loaded, all of them its own
  defp run_and_release(dir, bombus, env) do
    project = Path.join(dir, "posts")
    write(project, app(bombus))
    env = [{"MIX_ENV", "prod"} | env]

    ran = run(project, "mix", ["run", "-e", "Posts.write(\"coffee\")"], env)
    assert ran =~ ~r/POST: .*coffee/i

    run(project, "mix", ["release", "--quiet"], env)
    moved = Path.join(dir, "moved")
    File.rename!(Path.join(project, "_build/prod/rel/posts"), moved)
    File.rm_rf!(project)

    # Without the names that the toolchain gave, and without links to outside.
    env = [{"BOMBUS_MLX_DIR", nil}, {"LD_LIBRARY_PATH", nil}]
    ran = run(moved, Path.join(moved, "bin/posts"), ["eval", start_and_write()], env)
    assert ran =~ ~r/POST: .*coffee/i
    assert linked_outside(moved) == []

    # What is loaded is the release's own, though the original is still there.
    loaded = for [_line, library] <- Regex.scan(~r/LOADED: (\S+)/, ran), do: library
    assert Enum.all?(loaded, &String.starts_with?(&1, moved))
    loaded
  end

  defp start_and_write do
    """
    {:ok, _} = Application.ensure_all_started(:posts)
    Posts.write("coffee")
    maps = if File.exists?("/proc/self/maps"), do: File.read!("/proc/self/maps"), else: ""

    for [library] <- Enum.uniq(Regex.scan(~r"/\\S*(?:libmlx|bombus_nif)[^/\\s]*", maps)) do
      IO.puts("LOADED: " <> library)
    end
    """
  end

  defp linked_outside(release) do
    [native] = Path.wildcard(Path.join(release, "lib/bombus-*/priv/native"))

    for path <- Path.wildcard(Path.join(native, "**")),
        match?({:ok, _target}, File.read_link(path)),
        do: path
  end
end
