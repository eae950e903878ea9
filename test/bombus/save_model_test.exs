defmodule Bombus.SaveModelTest do
  # A saved model is there when it is whole, and nothing else is written to.
  use ExUnit.Case, async: true

  import Bitwise

  alias Bombus.{Error, Fixtures, Safetensors, Tensor}

  @moduletag :tmp_dir
  @python System.get_env("BOMBUS_PYTHON")
  @tensors "model.safetensors"

  defp copy(name, dir) do
    folder = Fixtures.copy(Fixtures.checkpoint(name), dir)
    File.rm_rf!(Path.join(folder, "adapters"))
    folder
  end

  defp add(folder, tensors), do: Fixtures.edit_tensor_list(folder, @tensors, &(tensors ++ &1))

  defp contents(folder) do
    for path <- Path.wildcard(folder <> "/**"), File.regular?(path), into: %{} do
      {Path.relative_to(path, folder), File.read!(path)}
    end
  end

  # mlx-lm, which takes a while to start, reads all of them.
  defp assert_mlx_lm_reads(folders) do
    script = """
    import sys
    from pathlib import Path
    from mlx_lm.utils import load_model
    for folder in sys.argv[1:]:
      load_model(Path(folder))
    """

    if @python do
      {output, status} = System.cmd(@python, ["-c", script | folders], stderr_to_stdout: true)
      assert status == 0, output
    end
  end

  describe "tensors that no module takes" do
    # A head of its own in a tied checkpoint, and what converters write of the rotation.
    defp with_more(dir) do
      folder = copy("f32-dense", dir)
      {:ok, embedding} = Safetensors.read_tensor(folder, "model.embed_tokens.weight")

      add(folder, [
        {"lm_head.weight", "F32", Tuple.to_list(embedding.shape), :binary.copy(embedding.binary)},
        {"model.layers.0.self_attn.rotary_emb.inv_freq", "F32", [1], <<0::32>>}
      ])
    end

    test "are left out, dense or quantized", %{tmp_dir: dir} do
      folder = with_more(dir)
      {:ok, plain} = Safetensors.read(copy("f32-dense", dir))

      for {quantization, place} <- [{nil, "dense"}, {:int4, "four"}] do
        model = Bombus.load_model!(folder, quantization: quantization)
        saved = Path.join(dir, place)
        assert :ok = Bombus.save_model(model, saved)
        {:ok, tensors} = Safetensors.read(saved)
        refute Enum.any?(Map.keys(tensors), &(&1 =~ ~r/lm_head|inv_freq/))
        if is_nil(quantization), do: assert(tensors == plain)
        ids = [1, 5, 9, 2]
        assert Bombus.score(Bombus.load_model!(saved), ids) == Bombus.score(model, ids)
      end

      assert_mlx_lm_reads(for place <- ["dense", "four"], do: Path.join(dir, place))
    end
  end

  describe "files" do
    test "that are links to the source's are replaced, and the source stays", %{tmp_dir: dir} do
      source = copy("bf16-dense", dir)
      before = contents(source)
      model = Bombus.load_model!(source)
      names = File.ls!(source)

      for {link, place} <- [{&File.ln!/2, "hard"}, {&File.ln_s!/2, "soft"}] do
        target = Path.join(dir, place)
        File.mkdir_p!(target)
        Enum.each(names, &link.(Path.join(source, &1), Path.join(target, &1)))
        assert :ok = Bombus.save_model(model, target, overwrite: true)
        assert contents(source) == before

        for name <- names do
          refute File.lstat!(Path.join(target, name)).inode ==
                   File.lstat!(Path.join(source, name)).inode

          assert File.lstat!(Path.join(target, name)).type == :regular
        end

        assert {:ok, _model} = Bombus.load_model(target)
      end
    end

    test "of another model go where that is asked for", %{tmp_dir: dir} do
      model = Bombus.load_model!(copy("bf16-dense", dir))
      target = copy("f32-three-shards", dir)
      File.write!(Path.join(target, "notes.md"), "mine")
      File.write!(Path.join(target, "chat_template.jinja"), "theirs")
      File.mkdir_p!(Path.join(target, "additional_chat_templates"))
      File.write!(Path.join(target, "additional_chat_templates/tool.jinja"), "theirs")
      before = contents(target)

      assert {:error, %Error{reason: :already_there} = error} = Bombus.save_model(model, target)
      assert error.message =~ target
      assert error.message =~ "overwrite: true"
      assert contents(target) == before

      assert :ok = Bombus.save_model(model, target, overwrite: true)
      names = Enum.sort(File.ls!(target))
      assert names == ["config.json", "expected.json", "model.safetensors", "notes.md"]
      assert File.read!(Path.join(target, "notes.md")) == "mine"
      again = Bombus.load_model!(target)
      assert Bombus.score(again, [1, 2, 3]) == Bombus.score(model, [1, 2, 3])
      # Without it, into a folder that has none.
      plain = Path.join(dir, "plain")
      File.mkdir_p!(plain)
      File.write!(Path.join(plain, "notes.md"), "mine")
      assert :ok = Bombus.save_model(model, plain)
      assert File.read!(Path.join(plain, "notes.md")) == "mine"

      assert_raise ArgumentError, ~r/:overwrite/, fn ->
        Bombus.save_model(model, plain, overwrite: 1)
      end
    end

    test "of half a model are not mixed with another's", %{tmp_dir: dir} do
      source = copy("bf16-dense", dir)
      File.write!(Path.join(source, "README.md"), "the model's")
      model = Bombus.load_model!(source)

      for name <- ~w(tokenizer.json tokenizer_config.json chat_template.jinja merges.txt
                     generation_config.json special_tokens_map.json README.md
                     additional_chat_templates/tool_use.jinja) do
        target = Path.join(dir, "target-" <> Path.rootname(Path.basename(name)))
        path = Path.join(target, name)
        File.mkdir_p!(Path.dirname(path))
        File.write!(path, "theirs")
        File.write!(Path.join(target, "notes.md"), "mine")
        before = contents(target)

        assert {:error, %Error{reason: :already_there} = error} = Bombus.save_model(model, target)
        assert error.message =~ target and error.message =~ "overwrite: true"
        assert error.message =~ "`#{name |> Path.split() |> hd()}`"
        assert contents(target) == before

        assert :ok = Bombus.save_model(model, target, overwrite: true)

        assert contents(target) |> Map.keys() |> Enum.sort() ==
                 ~w(README.md config.json expected.json model.safetensors notes.md)

        assert File.read!(Path.join(target, "README.md")) == "the model's"
      end
    end

    test "are not written where no folder can be", %{tmp_dir: dir} do
      model = Bombus.load_model!(copy("bf16-dense", dir))
      path = &Path.join(dir, &1)
      File.write!(path.("file"), "")
      File.ln_s!("nowhere", path.("dangling"))
      File.ln_s!("loop", path.("loop"))
      before = File.ls!(dir)

      for {target, words} <- [
            {"file", "expected a folder, `#{dir}/file` is a file"},
            {"file/model", "expected a folder, `#{dir}/file` is a file"},
            {"file/deep/model", "expected a folder, `#{dir}/file` is a file"},
            {"dangling", "`#{dir}/dangling` is a link to `nowhere`, which is not there"},
            {"dangling/model", "`#{dir}/dangling` is a link to `nowhere`, which is not there"},
            {"loop", "symbolic links"}
          ],
          overwrite <- [false, true] do
        assert {:error, %Error{reason: :io} = error} =
                 Bombus.save_model(model, path.(target), overwrite: overwrite)

        assert error.message =~ "could not write `#{dir}/#{target}`"
        assert error.message =~ words
        assert File.ls!(dir) == before
      end
    end

    test "have the rights of any other, their folder too", %{tmp_dir: dir} do
      saved = Path.join([dir, "deep", "saved"])
      :ok = Bombus.save_model(Bombus.load_model!(:demo), saved)
      File.mkdir_p!(Path.join(dir, "usual"))
      File.write!(Path.join(dir, "usual/file"), "")
      rights = fn path -> File.stat!(Path.join(dir, path)).mode &&& 0o777 end
      assert rights.("deep/saved") == rights.("usual")
      assert rights.("deep/saved/config.json") == rights.("usual/file")
      assert rights.("deep/saved/model.safetensors") == rights.("usual/file")
    end

    test "in other formats stay behind, and an index that is left from before", %{tmp_dir: dir} do
      folder = copy("bf16-dense", dir)

      for name <- ~w(pytorch_model.bin model.Q4_K_M.gguf consolidated.safetensors) do
        File.write!(Path.join(folder, name), "x")
      end

      File.write!(
        Path.join(folder, "model.safetensors.index.json"),
        ~s({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})
      )

      File.write!(Path.join(folder, "tokenizer.model"), "kept")
      File.mkdir_p!(Path.join(folder, "additional_chat_templates"))
      File.write!(Path.join(folder, "additional_chat_templates/tool.jinja"), "kept")
      saved = Path.join(dir, "saved")
      :ok = Bombus.save_model(Bombus.load_model!(folder), saved)

      assert Enum.sort(Map.keys(contents(saved))) ==
               ~w(additional_chat_templates/tool.jinja config.json expected.json model.safetensors
                  tokenizer.model)
    end

    test "a configuration loses a quantization that is left from before", %{tmp_dir: dir} do
      folder = copy("bf16-dense", dir)
      left = %{"quant_method" => "gptq", "bits" => 4}
      Fixtures.edit_json(folder, "config.json", &Map.put(&1, "quantization_config", left))
      saved = Path.join(dir, "saved")
      model = Bombus.load_model!(folder)
      assert model.quantization == nil
      :ok = Bombus.save_model(model, saved)
      refute Fixtures.read_json(Path.join(saved, "config.json"))["quantization_config"]
      assert_mlx_lm_reads([saved])
    end

    test "a folder's own source by another name is refused", %{tmp_dir: dir} do
      own = copy("bf16-dense", dir)
      model = Bombus.load_model!(own)
      link = Path.join(dir, "link")
      File.ln_s!(own, link)

      for path <- [own, link, Path.join(own, "../#{Path.basename(own)}")] do
        assert {:error, %Error{reason: :io} = error} =
                 Bombus.save_model(model, path, overwrite: true)

        assert error.message =~ "another folder"
      end
    end
  end

  describe "a full disk" do
    # A disk of its own needs a namespace of its own, which not every machine gives.
    @namespace match?(
                 {_, 0},
                 System.cmd("sh", ["-c", "unshare -rm true"], stderr_to_stdout: true)
               )

    @tag skip: if(!@namespace, do: "no mount namespaces here")
    test "is named with the target's path, and nothing stays", %{tmp_dir: dir} do
      source = copy("bf16-dense", dir)
      disk = Path.join(dir, "disk")
      File.mkdir_p!(disk)

      script = """
      model = Bombus.load_model!(#{inspect(source)}, device: :cpu)
      for target <- ["", "deep/er/model"], quantization <- [nil, :int4] do
        model = Bombus.load_model!(#{inspect(source)}, quantization: quantization, device: :cpu)
        path = Path.join(#{inspect(disk)}, target)
        {:error, error} = Bombus.save_model(model, path)
        IO.inspect({error.reason, error.message =~ path, File.ls!(#{inspect(disk)})})
      end
      tensor = Bombus.Tensor.new({:u, 8}, {100_000}, :binary.copy("a", 100_000))
      file = Path.join(#{inspect(disk)}, "a.safetensors")
      {:error, error} = Bombus.Safetensors.write(file, %{"a" => tensor})
      IO.inspect({error.reason, error.message =~ file, File.ls!(#{inspect(disk)})})
      System.halt(0)
      """

      mount = "mount -t tmpfs -o size=32k tmpfs \"$0\" && exec elixir \"$@\""
      arguments = ["-rm", "sh", "-c", mount, disk | Fixtures.elixir_arguments(script)]
      {output, status} = System.cmd("unshare", arguments, stderr_to_stdout: true)
      assert status == 0, output
      assert output == String.duplicate("{:disk_full, true, []}\n", 5)
    end
  end

  describe "Safetensors.write" do
    test "leaves other files alone, and replaces links", %{tmp_dir: dir} do
      path = Path.join(dir, "a.safetensors")
      victim = Path.join(dir, "victim")
      File.write!(victim, "kept")
      for name <- [".new", ".tmp", ".part"], do: File.ln_s!(victim, path <> name)
      File.ln_s!(victim, path)
      assert :ok = Safetensors.write(path, %{"a" => Tensor.new({:u, 8}, {1}, "a")})
      assert File.read!(victim) == "kept"
      assert File.lstat!(path).type == :regular
      assert {:ok, %{"a" => _tensor}} = Safetensors.read(path)
      assert length(File.ls!(dir)) == 5
    end

    test "writes to no folder, device or FIFO", %{tmp_dir: dir} do
      fifo = Path.join(dir, "fifo")
      {_output, 0} = System.cmd("mkfifo", [fifo])

      for {path, word} <- [{dir, "a folder"}, {fifo, "a FIFO"}, {"/dev/null", "a device"}] do
        assert {:error, %Error{reason: :io} = error} = Safetensors.write(path, %{})
        assert error.message =~ word
      end
    end
  end
end
